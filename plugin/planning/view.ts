/** A request as the planner sees it. */
import type { MediaItem } from '../../adapters/adapter.ts'
import type { NodeSnapshot } from '../registry/types.ts'
import type { StageTimes } from './time-line.ts'

/** Why a request can't be disaggregated: one node must do both prefill and decode. */
export interface SingleNode {
  /** For people: `n greater than 1`. */
  readonly what: string
  /** The request's member that causes it. */
  readonly param?: string | undefined
  /** `request`: the client wrote it so. `attempt`: an earlier attempt has shown it. */
  readonly source: 'request' | 'attempt'
}

/** All the planner knows of a request. */
export interface RequestView {
  readonly model: string
  readonly media: readonly MediaItem[]
  /** Bodies of this route may mean media that the gateway does not see (an earlier response's, a form's): prefer nodes that could take some. */
  readonly opaque?: boolean
  /** Estimated, of text and media together. */
  readonly promptTokens?: number
  readonly singleNode?: SingleNode | undefined
  /** What the requests of its conversation have in common; undefined: nothing is known. Reads the body each time. */
  readonly conversation?: ((by: 'prefix' | 'session') => string | undefined) | undefined
  /** What its model's stages have taken at nodes of a role. */
  readonly times?: ((role: NodeSnapshot['role']) => StageTimes | undefined) | undefined
  /** Is an encoder known to have this item already? */
  readonly has?: ((encoder: NodeSnapshot, item: MediaItem) => boolean) | undefined
}
