import { propagation, ROOT_CONTEXT, trace, type Context } from '@opentelemetry/api'
import { CacheError } from '../../cache/room-queue.ts'
import { ATTR, ENGINE_TRACER_NAME, SPAN } from '../../../adapters/wire/semconv.ts'
import { spanTime } from '../../../adapters/wire/spans.ts'
import type { P2PNode } from '../../p2p/node.ts'
import { P2PError, type OfferName } from '../../p2p/types.ts'
import type { EngineCounters, EngineLog } from '../../service/engine-service.ts'
import type { RemoteMedia } from '../sequence/prompt.ts'
import type { FeatureFetcher } from './feature-fetcher.ts'
import { transferAttributes } from './migration-loop.ts'

/** Pulls ahead at a time: half of what a link has place for, so that those of requests that are here find the other half. */
const MAX_AHEAD = 16
/** Of these, for one encoder: one that fills nothing leaves places for the others. */
const MAX_OF_PEER = MAX_AHEAD / 2

export interface PullAheadOptions {
  readonly p2p: Pick<P2PNode, 'ask'>
  readonly fetcher: Pick<FeatureFetcher, 'pullAhead'>
  readonly counters: EngineCounters
  readonly log: EngineLog
  /** Checks what an encoder says of its item. */
  read (offer: unknown): RemoteMedia
  /** Its features are here, or will be. */
  arrived (media: RemoteMedia, offer: unknown): void
}

/**
 * Takes up the offers of encoders: pulls features that are still being made, ahead of the request that they are for. They are
 * in the cache then, as if an earlier request had left them, and the request finds them or pulls them itself. Requests that
 * are here come first: `giveWay` frees all blocks that wait for encoders.
 */
export class PullAhead {
  readonly #options: PullAheadOptions
  /** By what ends them: the engine that each is from. */
  readonly #pulls = new Map<AbortController, string>()

  constructor (options: PullAheadOptions) {
    this.#options = options
  }

  /** Never rejects. What an offer says is asked again over this engine's own link, because whoever reaches the socket may send one. */
  async take ({ engineId, lease, traceparent }: OfferName): Promise<void> {
    const { counters, log } = this.#options
    const pull = new AbortController()
    try {
      const ofPeer = [...this.#pulls.values()].filter(other => other === engineId).length
      if (this.#pulls.size >= MAX_AHEAD || ofPeer >= MAX_OF_PEER) throw new Error('too many pulls ahead are under way')
      this.#pulls.set(pull, engineId)
      const context = traceparent === undefined ? ROOT_CONTEXT : propagation.extract(ROOT_CONTEXT, { traceparent })
      await this.#pull(engineId, lease, { signal: pull.signal, context })
    } catch (err) {
      counters.ahead.dropped++
      log.debug({ err, peer: engineId }, 'features were not pulled ahead of their request')
    } finally {
      this.#pulls.delete(pull)
    }
  }

  async #pull (engineId: string, lease: string, { signal, context }: { signal: AbortSignal, context: Context }): Promise<void> {
    const { p2p, fetcher, counters, read, arrived } = this.#options
    const offer = await p2p.ask({ engineId, lease }, { signal })
    const media = read(offer)
    const { source } = media
    // Its features would be found as those of another encoder.
    if (source.engineId !== engineId || source.lease !== lease) throw new Error(`${engineId} offers what is not its own`)
    const span = trace.getTracer(ENGINE_TRACER_NAME).startSpan(SPAN.engineAhead, { startTime: spanTime(), attributes: { [ATTR.pool]: 'feature' } }, context)
    try {
      const fetched = await fetcher.pullAhead(media, { signal, context: trace.setSpan(context, span) })
      span.setAttributes({ [ATTR.cached]: fetched === undefined ? 1 : 0, ...transferAttributes(new Map([[engineId, fetched?.bytes ?? 0]]), fetched?.blocks ?? 0, fetched?.link) })
      if (fetched !== undefined) counters.ahead.pulled++
      arrived(media, offer)
    } catch (err) {
      // No error of the request: it pulls the features itself.
      span.setAttribute(ATTR.errorType, err instanceof P2PError || err instanceof CacheError ? err.code : '_OTHER')
      throw err
    } finally {
      span.end(spanTime())
    }
  }

  /** A request waits for room. */
  giveWay (): void {
    for (const pull of this.#pulls.keys()) pull.abort(new Error('a request needs the room'))
  }
}
