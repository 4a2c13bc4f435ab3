import type { MediaItem } from '../../adapters/adapter.ts'
import type { Body } from '../body/index.ts'
import type { RequestView, Undivided } from '../planning/index.ts'
import { severalPrompts } from './prompts.ts'

const COMPLETIONS = '/v1/completions'
/** Routes that adapters know how to share between P and D. */
const SHARED: ReadonlySet<string> = new Set(['/v1/chat/completions', COMPLETIONS])
/** Routes whose bodies have `messages` or no media at all. */
const SCANNED: ReadonlySet<string> = new Set([...SHARED, '/v1/embeddings'])
/** Of JSON text in a Latin script; an estimate for choosing a plan, not a count. */
const BYTES_PER_TOKEN = 4

/** A request as the planner sees it. What few plans need is worked out when one asks. */
export class View implements RequestView {
  readonly model: string
  readonly media: readonly MediaItem[]
  readonly opaque: boolean
  readonly #body: Body
  readonly #path: string
  readonly #found: Undivided | undefined

  /** @param found why an earlier plan to share it has failed */
  constructor (body: Body, path: string, found?: Undivided) {
    this.model = body.model
    this.media = body.media
    this.opaque = !SCANNED.has(path)
    this.#body = body
    this.#path = path
    this.#found = found
  }

  get promptTokens (): number {
    return promptTokens(this.#body)
  }

  get undivided (): Undivided | undefined {
    return this.#found ?? undividedBy(this.#body, this.#path)
  }
}

export function promptTokens (body: Body): number {
  return body.media.reduce((sum, item) => sum + item.tokens, Math.ceil(body.textBytes / BYTES_PER_TOKEN))
}

/** P's one token and its KV blocks begin one answer to one prompt. */
function undividedBy (body: Body, path: string): Undivided | undefined {
  if (!SHARED.has(path)) return { what: 'this route', asked: true }
  for (const param of ['n', 'best_of']) {
    const value = body.scalar(param)
    if (typeof value === 'number' && value > 1) return { what: `${param} greater than 1`, param, asked: true }
  }
  const prompt = path === COMPLETIONS ? body.json('prompt') : undefined
  return prompt !== undefined && severalPrompts(prompt) ? { what: 'several prompts', param: 'prompt', asked: true } : undefined
}
