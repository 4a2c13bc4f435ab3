import type { FeatureCache } from '../../cache/feature-cache.ts'
import type { LoadedModel } from '../../models/family.ts'
import type { ChatCall } from '../../service/engine-service.ts'
import { EngineError } from '../../service/errors.ts'
import type { LlmEngine } from '../engine.ts'
import type { RemoteMedia, SequenceMedia } from '../sequence/prompt.ts'
import { GREEDY } from '../sequence/sampling.ts'
import type { Sequence } from '../sequence/sequence.ts'

/** Requests in view at a time; of more, the oldest is forgotten. */
const MAX_REQUESTS = 64

/** A request whose media encoders are at work on. */
interface Prepared extends Pick<ChatCall, 'requestId' | 'tenant' | 'context'> {
  /** Of its text, with one placeholder for each item. */
  readonly tokens: readonly number[]
  /** Where the placeholders are. */
  readonly places: readonly number[]
  /** Its items, as far as their features have come. */
  readonly media: Array<RemoteMedia | undefined>
  /** How much of the prompt was begun. */
  begun: number
}

export interface PreparedParts {
  readonly model: LoadedModel
  readonly features: FeatureCache
  readonly engine: LlmEngine
  readonly blockTokens: number
  /** Requests are here. */
  readonly busy: boolean
}

/**
 * Requests that will come when encoders have their media. While the engine has nothing else to do it computes their prompts
 * up to the first item that is not here; the request finds that in the prefix cache. What is computed is right whoever
 * said what is to come, because that cache goes by content.
 */
export class PreparedRequests {
  readonly #requests = new Map<string, Prepared>()
  readonly #running = new Set<Sequence>()

  /** @param items how many placeholders the tokens must have: others stand in the client's text */
  add ({ requestId, tenant, context }: ChatCall, tokens: readonly number[], items: number, parts: PreparedParts): void {
    const places = tokens.flatMap((token, i) => token === parts.model.imageTokenId ? [i] : [])
    if (places.length !== items || parts.busy) return
    const prepared: Prepared = { requestId, tenant, context, tokens, places, media: [], begun: 0 }
    this.#requests.set(requestId, prepared)
    if (this.#requests.size > MAX_REQUESTS) this.#requests.delete(this.#requests.keys().next().value!)
    this.#advance(prepared, parts)
  }

  /** Features are here. @param name `<id>:<n>`: item `n` of the request with this id */
  arrived (name: string, media: RemoteMedia, parts: PreparedParts): void {
    const at = name.lastIndexOf(':')
    const prepared = this.#requests.get(name.slice(0, at))
    const n = Number(name.slice(at + 1))
    if (prepared === undefined || !(n >= 0 && n < prepared.places.length)) return
    prepared.media[n] = media
    this.#advance(prepared, parts)
  }

  /** A request is here: what is computed for others gives way. */
  begin (requestId: string, engine: LlmEngine): void {
    this.#requests.delete(requestId)
    for (const sequence of this.#running) {
      if (sequence.requestId !== requestId) engine.interrupt(sequence, { kind: 'stopped', error: new EngineError('cancelled', 'another request has come') })
    }
  }

  /** Sequences that are computed ahead. */
  get running (): number {
    return this.#running.size
  }

  #advance (prepared: Prepared, { model, features, engine, blockTokens, busy }: PreparedParts): void {
    const { requestId, tenant, context, tokens, places } = prepared
    // One request at a time: a flood of them makes no queue.
    if (busy || [...this.#running].some(sequence => sequence.requestId !== requestId)) return
    const media: SequenceMedia[] = []
    for (const place of places.keys()) {
      const item = prepared.media[place]
      const entry = item && features.lookup(item.contentHash)
      if (item === undefined || entry?.state !== 'ready' || entry.numTokens !== item.numTokens) break
      media.push({ contentHash: item.contentHash, numTokens: item.numTokens, grid: item.grid, features: entry })
    }
    // With its last item the request itself is there.
    if (media.length === places.length) return
    const { ids, mediaSpans: spans } = model.layoutPrompt(tokens.slice(0, places[media.length]), media)
    if (ids.length - prepared.begun < blockTokens || ids.length >= engine.maxLength) return
    const positions = model.positions(ids, spans, media)
    prepared.begun = ids.length
    for (const { features: entry } of media) features.ref(entry!)
    const sequence = engine.submit({
      tokens: ids,
      positions,
      spans,
      media,
      id: engine.nextId(),
      requestId,
      cacheSalt: tenantSalt(tenant),
      sampling: GREEDY,
      maxTokens: 0,
      context,
      sink: { onToken: () => true, onEnd: ended => { this.#running.delete(ended) } }
    })
    // An engine that closes ends it at once.
    if (sequence.outcome === undefined) this.#running.add(sequence)
  }
}

/** What prefix caches keep apart. */
export function tenantSalt (tenant = ''): string {
  return `tenant:${tenant}`
}
