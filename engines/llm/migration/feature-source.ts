import type { FetchCall, Fetched } from './block-link.ts'
import type { SequenceMedia } from '../sequence/sequence.ts'
import type { EncoderResultEntry } from '../sequence/remote.ts'

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
