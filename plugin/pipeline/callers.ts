/** Requests whose language model calls its encoders by itself: the encode calls that come in find theirs here. */
import { createHash } from 'node:crypto'
import type { MediaItem } from '../../adapters/adapter.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { OpenStage, RequestTrace } from '../telemetry/spans.ts'

/** Calls may come after their request has ended here: a language server goes on when its client has left. Milliseconds. */
const REMEMBERED_MS = 200_000

/** What the exchange of such a request offers: its span, its end. */
export interface Origin {
  readonly callId: string
  readonly request: { readonly body: { readonly model: string, readonly bytes: Buffer, readonly media: readonly MediaItem[] } }
  readonly trace: RequestTrace
  encodedBy: readonly string[]
  cancel (reason: unknown): void
}

/** One such request. Goes on after the exchange has ended. */
export class Caller {
  readonly id: string
  readonly model: string
  readonly media: readonly MediaItem[]
  readonly #exchange: Origin
  readonly #encodedBy: string[] = []
  /** Items that no encode call has come for yet. */
  readonly #unclaimed: MediaItem[]
  #hashes: ReadonlyMap<MediaItem, string> | undefined
  #span: OpenStage | undefined
  #tokens = 0
  /** Items that are encoded. */
  #encoded = 0
  endedAt: number | undefined

  constructor (exchange: Origin) {
    this.id = exchange.callId
    this.model = exchange.request.body.model
    this.media = exchange.request.body.media
    this.#unclaimed = [...this.media]
    this.#exchange = exchange
  }

  /** Every item has reached the language model. */
  get served (): boolean {
    return this.#encoded >= this.media.length
  }

  /** Are these the hashes of the URLs of pictures that still are to be encoded? Fingerprints would not do: another client's picture may have the same. */
  awaits (hashes: readonly string[]): boolean {
    const { bytes } = this.#exchange.request.body
    this.#hashes ??= new Map(this.media.map(item => [item, createHash('sha256').update(bytes.subarray(item.url.start, item.url.end)).digest('hex')]))
    const left = this.#unclaimed.map(item => this.#hashes!.get(item))
    return hashes.every(hash => {
      const at = left.indexOf(hash)
      if (at !== -1) left.splice(at, 1)
      return at !== -1
    })
  }

  /** The items with these fingerprints, for one encode call: a picture that stands in the request twice is encoded twice. */
  claim (keys: readonly string[]): MediaItem[] {
    return keys.flatMap(key => {
      const at = this.#unclaimed.findIndex(item => item.routeKey === key)
      return at === -1 ? [] : this.#unclaimed.splice(at, 1)
    })
  }

  /** Span of all encode calls of the request. */
  get span (): OpenStage {
    this.#span ??= this.#exchange.trace.begin(SPAN.encode, { [ATTR.items]: this.media.length })
    return this.#span
  }

  /**
   * `node` encodes these items, as far as can be seen: a part may move on. Said before the embeddings leave the encoder,
   * because the language model may answer before the encoder does.
   */
  placed (node: string, items: readonly MediaItem[]): void {
    for (const { index } of items) this.#encodedBy[index] = node
    if (this.endedAt === undefined) this.#exchange.encodedBy = Object.values(this.#encodedBy)
  }

  /** So many items have reached the language model. */
  encoded (count: number, tokens: number): void {
    this.#encoded += count
    this.#tokens += tokens
    if (!this.served) return
    this.#exchange.trace.set({ [ATTR.imageTokens]: this.#tokens })
    this.span.set({ [ATTR.encoders]: Object.values(this.#encodedBy), [ATTR.tokens]: this.#tokens })
    this.span.end()
  }

  /** The request can't be answered: its client learns why at once, whatever the language server still needs. */
  refuse (error: unknown): void {
    this.#span?.end({ error })
    this.#exchange.cancel(error)
  }
}

export class Callers {
  readonly #byId = new Map<string, Caller>()

  /** @returns ends it: no call can be for it unless the language server goes on with it */
  add (exchange: Origin): () => void {
    this.#forget()
    const caller = new Caller(exchange)
    this.#byId.set(caller.id, caller)
    return () => {
      caller.endedAt = performance.now()
      if (caller.served) this.#byId.delete(caller.id)
    }
  }

  /** By the id under which the request went to the language server; where that does not pass it on, by the hashes of the pictures' URLs. */
  find (id: string, hashes: () => readonly string[]): Caller | undefined {
    // P's call has a name of its own.
    const named = this.#byId.get(id) ?? this.#byId.get(id.replace(/\.p$/, ''))
    if (named !== undefined) return named
    let wanted: readonly string[] | undefined
    return [...this.#byId.values()].find(caller => caller.endedAt === undefined && caller.awaits(wanted ??= hashes()))
  }

  #forget (): void {
    const before = performance.now() - REMEMBERED_MS
    for (const [id, { endedAt }] of this.#byId) if (endedAt !== undefined && endedAt < before) this.#byId.delete(id)
  }
}
