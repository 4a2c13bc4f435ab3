import type { BodyEdits, MediaItem, RequestBody } from '../../adapters/adapter.ts'
import { compact } from './chunks.ts'
import type { Collector } from './collector.ts'
import { epdError } from '../errors.ts'
import { memberOf } from './found.ts'
import type { Member } from './found.ts'
import { decodeString } from './text.ts'

/** What a pick takes over beside the media parts: these change how media are read. */
const PICKED_MEMBERS = ['model', 'mm_processor_kwargs', 'media_io_kwargs'] as const

const COMMA = Buffer.from(',')

interface Replacement { readonly start: number, readonly end: number, readonly bytes: Buffer }

/** A request body as the plugin's core sees it. */
export interface Body extends RequestBody {
  /** The body as it came. */
  readonly bytes: Buffer
  /** Bytes that are not media: a measure of the prompt. */
  readonly textBytes: number
  /** Control fields that the client tried to send. */
  readonly stripped: readonly string[]
  /** JSON text of a top-level member; undefined when it is absent. */
  json (name: string): Buffer | undefined
}

/** A scanned body. Made by `parseBody`; the bytes must not change any more. */
export class ScannedBody implements Body {
  readonly bytes: Buffer
  readonly media: readonly MediaItem[]
  readonly model: string
  readonly stream: boolean
  readonly textBytes: number
  readonly stripped: readonly string[]
  /** Top-level members that go upstream, in order. */
  readonly #kept: readonly Member[]
  readonly #rootStart: number
  readonly #rootEnd: number

  constructor (bytes: Buffer, scanned: Collector, media: readonly MediaItem[], requireModel: boolean) {
    this.bytes = bytes
    this.media = media
    this.#kept = scanned.kept
    this.stripped = scanned.stripped
    this.#rootStart = scanned.rootStart
    this.#rootEnd = scanned.rootEnd
    this.textBytes = media.reduce((rest, item) => rest - (item.url.end - item.url.start), bytes.length)
    this.model = this.#readModel(requireModel)
    this.stream = this.#readStream()
  }

  has (name: string): boolean {
    return memberOf(this.#kept, name) !== undefined
  }

  scalar (name: string): string | number | boolean | null | undefined {
    const member = memberOf(this.#kept, name)
    if (member === undefined) return undefined
    switch (member.kind) {
      case 'string': return decodeString(this.bytes, member.valueStart + 1, member.end - 1, member.escaped)
      case 'number': return Number(this.bytes.toString('latin1', member.valueStart, member.end))
      case 'true': return true
      case 'false': return false
      case 'null': return null
      default: return undefined
    }
  }

  json (name: string): Buffer | undefined {
    const member = memberOf(this.#kept, name)
    return member && this.bytes.subarray(member.valueStart, member.end)
  }

  splice (edits: BodyEdits): Buffer[] {
    const set = new Map(Object.entries(edits.set ?? {}))
    const replacements = this.#mediaReplacements(edits.mediaUrls)
    const gone = new Set<Member>()
    for (const name of edits.remove ?? []) {
      const member = memberOf(this.#kept, name)
      if (member !== undefined && !set.has(name)) gone.add(member)
    }
    for (const [name, json] of set) {
      const member = memberOf(this.#kept, name)
      if (member === undefined) continue
      replacements.push({ start: member.valueStart, end: member.end, bytes: Buffer.from(json) })
      set.delete(name)
    }
    const members = gone.size === 0 ? this.#kept : this.#kept.filter(member => !gone.has(member))
    if (replacements.length === 0 && set.size === 0 && gone.size === 0 && this.stripped.length === 0) return [this.bytes]
    replacements.sort((a, b) => a.start - b.start)
    return compact(this.#assemble(members, replacements, set))
  }

  pick (items: readonly MediaItem[], set: Readonly<Record<string, string>> = {}): Buffer[] {
    const chunks: Buffer[] = [Buffer.from('{')]
    for (const name of PICKED_MEMBERS) {
      const member = memberOf(this.#kept, name)
      if (member === undefined || Object.hasOwn(set, name)) continue
      chunks.push(Buffer.from(`"${name}":`), this.bytes.subarray(member.valueStart, member.end), COMMA)
    }
    for (const [name, json] of Object.entries(set)) chunks.push(Buffer.from(`${JSON.stringify(name)}:${json},`))
    chunks.push(Buffer.from('"messages":['))
    let message: number | undefined
    for (const item of items) {
      if (item.message === message) chunks.push(COMMA)
      else chunks.push(Buffer.from(`${message === undefined ? '' : ']},'}{"role":"user","content":[`))
      message = item.message
      chunks.push(this.bytes.subarray(item.span.start, item.span.end))
    }
    chunks.push(Buffer.from(message === undefined ? ']}' : ']}]}'))
    return compact(chunks)
  }

  /** The original text with runs of kept members joined by commas, replaced values and new members. */
  #assemble (members: readonly Member[], replacements: readonly Replacement[], added: ReadonlyMap<string, string>): Buffer[] {
    const chunks: Buffer[] = [this.bytes.subarray(0, this.#rootStart + 1)]
    let next = 0
    const copy = (start: number, end: number): void => {
      let pos = start
      while (next < replacements.length && replacements[next]!.start < start) next++
      for (; next < replacements.length && replacements[next]!.end <= end; next++) {
        const { start: from, end: to, bytes } = replacements[next]!
        // A member that is replaced as a whole takes the edits inside of it with it.
        if (from < pos) continue
        chunks.push(this.bytes.subarray(pos, from), bytes)
        pos = to
      }
      chunks.push(this.bytes.subarray(pos, end))
    }
    runsOf(members).forEach((run, i) => {
      if (i > 0) chunks.push(COMMA)
      copy(run.start, run.end)
    })
    let first = members.length === 0
    for (const [name, json] of added) {
      chunks.push(Buffer.from(`${first ? '' : ','}${JSON.stringify(name)}:${json}`))
      first = false
    }
    chunks.push(this.bytes.subarray(this.#rootEnd))
    return chunks.filter(chunk => chunk.length > 0)
  }

  #mediaReplacements (urls: BodyEdits['mediaUrls']): Replacement[] {
    const replacements: Replacement[] = []
    urls?.forEach((url, i) => {
      const item = this.media[i]
      if (url === undefined || item === undefined) return
      replacements.push({ ...item.url, bytes: Buffer.from(JSON.stringify(url).slice(1, -1)) })
    })
    return replacements
  }

  #readModel (required: boolean): string {
    const model = this.scalar('model')
    if (typeof model === 'string' && model !== '') return model
    if (!this.has('model') && !required) return ''
    if (!this.has('model')) throw epdError('EPD_ERR_MISSING_VALUE', ['model'], { param: 'model' })
    throw epdError('EPD_ERR_INVALID_VALUE', ['model must be a non-empty string'], { param: 'model' })
  }

  #readStream (): boolean {
    const stream = this.scalar('stream')
    if (typeof stream === 'boolean') return stream
    if (stream === null || !this.has('stream')) return false
    throw epdError('EPD_ERR_INVALID_VALUE', ['stream must be true or false'], { param: 'stream' })
  }
}

/** Members next to each other keep what stands between them; only gaps need a new comma. */
function runsOf (members: readonly Member[]): Array<{ start: number, end: number }> {
  const runs: Array<{ start: number, end: number }> = []
  let last: Member | undefined
  for (const member of members) {
    if (last !== undefined && member.index === last.index + 1) runs[runs.length - 1]!.end = member.end
    else runs.push({ start: member.start, end: member.end })
    last = member
  }
  return runs
}
