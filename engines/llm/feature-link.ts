import { propagation, type Context } from '@opentelemetry/api'
import type { EngineCounters, EngineLog } from '../engine-service.ts'
import type { P2PNode } from '../p2p/node.ts'
import type { EncoderResultEntry } from './encoder-result.ts'
import type { SequenceMedia } from './sequence.ts'

export interface FeatureLinkOptions {
  readonly p2p: Pick<P2PNode, 'pull' | 'ack'>
  /** Bytes of one row of features. */
  readonly rowBytes: number
  readonly counters: EngineCounters
  readonly log: EngineLog
  /** How long one item's bytes may take, milliseconds. */
  readonly pullTimeoutMs: number
}

export interface FetchCall {
  readonly signal: AbortSignal
  /** Its span is the parent of what the encoder records of the transfer. */
  readonly context: Context
}

/** What fetching an item cost. */
export interface Fetched {
  readonly bytes: number
  readonly blocks: number
  /** Transport of the link; undefined when nothing was pulled. */
  readonly link: string | undefined
}

/** A media item whose features lie in another engine. */
export type RemoteMedia = SequenceMedia & { readonly source: EncoderResultEntry }

/**
 * Where a migration gets features from. Every item is claimed before any is fetched; a claim ends by one `fetch` or one
 * `drop`. `C` is whatever the source wants to remember between the two.
 */
export interface FeatureSource<C = unknown> {
  /** Finds the item, or what it needs to get here. Rejects with the signal's reason, or CacheError for lack of room. */
  claim (media: RemoteMedia, signal: AbortSignal): Promise<C>
  /** Gives up a claim that was not carried out. */
  drop (claim: C): void
  /** Carries out a claim and ACKs the lease. When it has settled nothing is written for the item any more. */
  fetch (media: RemoteMedia, claim: C, call: FetchCall): Promise<Fetched>
  /** Resolves when the ACKs under way have been answered. */
  settled (): Promise<void>
}

/** Pulls of feature blocks from encoders, and the ACKs after them. */
export class FeatureLink {
  readonly #options: FeatureLinkOptions
  readonly #acks = new Set<Promise<unknown>>()

  constructor (options: FeatureLinkOptions) {
    this.#options = options
  }

  /** Pulls an item's features into blocks of the local feature pool. Rejects with P2PError. */
  async pull ({ source, numTokens }: RemoteMedia, localBlocks: readonly number[], { signal, context }: FetchCall): Promise<Fetched> {
    const { p2p, rowBytes, pullTimeoutMs, counters } = this.#options
    const { engineId, epoch, lease, blocks } = source
    const { bytes, transport } = await p2p.pull({
      engineId,
      epoch,
      lease,
      pool: 'feature',
      remoteBlocks: blocks,
      localBlocks,
      bytes: numTokens * rowBytes,
      signal,
      traceparent: traceparent(context),
      timeoutMs: pullTimeoutMs
    })
    counters.migratedBytes += bytes
    return { bytes, blocks: blocks.length, link: transport }
  }

  /** Not awaited: prefill need not wait for the answer, and the encoder's lease ends by itself if the message is lost. */
  ack ({ engineId, epoch, lease }: EncoderResultEntry, context: Context): void {
    const ack = this.#options.p2p.ack({ engineId, epoch, lease }, { traceparent: traceparent(context) })
      .catch((err: unknown) => this.#options.log.warn({ err, peer: engineId }, 'ACK failed; the lease will expire'))
      .finally(() => this.#acks.delete(ack))
    this.#acks.add(ack)
  }

  /** Resolves when the ACKs under way have been answered. */
  async settled (): Promise<void> {
    await Promise.all(this.#acks)
  }
}

function traceparent (context: Context): string | undefined {
  const carrier: { traceparent?: string } = {}
  propagation.inject(context, carrier)
  return carrier.traceparent
}
