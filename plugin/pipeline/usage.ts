import type { Completion } from '../../adapters/http.ts'

/** Chunks kept: the last events of a stream, or the end of a JSON answer. */
const CHUNKS = 8
/** Bytes of a chunk that is put to the one before it, while that is below 1 KiB: a node may send an event in many pieces, or pings after the last one. */
const TINY = 64
/** Bytes searched at the end. */
const MAX_BYTES = 16 * 1024

/** Token counts as in OpenAI's `usage`. */
interface Usage {
  readonly promptTokens: number | undefined
  readonly completionTokens: number | undefined
  readonly totalTokens: number | undefined
  readonly cachedTokens: number | undefined
}

/** What an answer says about itself at its end. */
export interface Closing {
  readonly usage: Usage | undefined
  readonly finishReason: string | undefined
}

/** Keeps the last bytes of an answer without copying or parsing; `read` looks for usage and finish reason in them once, at the end. */
export class UsageReader {
  bytes = 0
  readonly #chunks: Buffer[] = []
  /** The oldest, once all places are taken. */
  #next = 0
  #closing: Closing | undefined

  add (chunk: Buffer): void {
    this.bytes += chunk.length
    const newest = (this.#next || this.#chunks.length) - 1
    if (chunk.length < TINY && newest >= 0 && this.#chunks[newest]!.length < 1_024) this.#chunks[newest] = Buffer.concat([this.#chunks[newest]!, chunk])
    else if (this.#chunks.length < CHUNKS) this.#chunks.push(chunk)
    else {
      this.#chunks[this.#next] = chunk
      this.#next = (this.#next + 1) % CHUNKS
    }
  }

  /** Has a stream said that it is over? Generated text has no line of its own. */
  get done (): boolean {
    return /^data: ?\[DONE\]/m.test(this.#text())
  }

  /** Did a stream come to its end? One of choices that a node has cut in half may end in good order. @param choices it began with some */
  whole (choices: boolean): boolean {
    if (this.done) return true
    // The last event may be longer than what is searched for usage.
    const text = this.#text(Infinity)
    return !(choices || text.includes('"choices"')) || text.includes('"error"') || readFinishReason(text) !== undefined
  }

  /** At the end: later chunks change nothing. */
  read (): Closing {
    if (this.#closing !== undefined) return this.#closing
    const text = this.#text()
    return (this.#closing = { usage: readUsage(text), finishReason: readFinishReason(text) })
  }

  #text (bytes = MAX_BYTES): string {
    let text = ''
    const { length } = this.#chunks
    for (let i = 1; i <= length && text.length < bytes; i++) {
      const chunk = this.#chunks[(this.#next - i + length) % length]!
      // Only ASCII is looked for.
      text = chunk.toString('latin1', Math.max(0, chunk.length - bytes + text.length)) + text
    }
    return text
  }
}

/** Where the value of the last member of this name begins; inside of generated text the quotes would be escaped. */
function lastValue (text: string, name: string): number | undefined {
  const quoted = `"${name}"`
  for (let at = text.lastIndexOf(quoted); at !== -1; at = at === 0 ? -1 : text.lastIndexOf(quoted, at - 1)) {
    const colon = skipSpace(text, at + quoted.length)
    if (text[at - 1] !== '\\' && text[colon] === ':') return skipSpace(text, colon + 1)
  }
  return undefined
}

function skipSpace (text: string, from: number): number {
  let at = from
  while (text[at] === ' ' || text[at] === '\n' || text[at] === '\r' || text[at] === '\t') at++
  return at
}

/** The last reason that is not null: with usage at the end, its event has no choices. */
function readFinishReason (text: string): string | undefined {
  const at = lastValue(text, 'finish_reason')
  if (at === undefined) return undefined
  return /^"([a-z_]+)"/.exec(text.slice(at, at + 40))?.[1] ?? readFinishReason(text.slice(0, at - 3))
}

function readUsage (text: string): Usage | undefined {
  const start = lastValue(text, 'usage')
  // `"usage": null` stands in every event but the last.
  return start !== undefined && text[start] === '{' ? usageOf(parseObject(text, start)) : undefined
}

/** What a completion that was parsed says about itself. */
export function closingOf ({ choices, usage }: Completion['value']): Closing {
  const reason = (choices.at(-1) as { finish_reason?: unknown } | null)?.finish_reason
  return { usage: usageOf(usage as Record<string, unknown> | null | undefined), finishReason: typeof reason === 'string' ? reason : undefined }
}

function usageOf (usage: Record<string, unknown> | null | undefined): Usage | undefined {
  if (typeof usage !== 'object' || usage === null) return undefined
  return {
    promptTokens: count(usage.prompt_tokens),
    completionTokens: count(usage.completion_tokens),
    totalTokens: count(usage.total_tokens),
    cachedTokens: count((usage.prompt_tokens_details as { cached_tokens?: unknown } | null | undefined)?.cached_tokens)
  }
}

/** The object that starts here; usage holds numbers and objects only, so braces can be counted. */
function parseObject (text: string, start: number): Record<string, unknown> | undefined {
  let depth = 0
  for (let i = start; i < text.length; i++) {
    if (text[i] === '{') depth++
    if (text[i] !== '}' || --depth > 0) continue
    try {
      return JSON.parse(text.slice(start, i + 1)) as Record<string, unknown>
    } catch {
      return undefined
    }
  }
  return undefined
}

function count (value: unknown): number | undefined {
  return typeof value === 'number' && Number.isFinite(value) ? value : undefined
}
