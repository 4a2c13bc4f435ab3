/** What a gateway that is one of several processes has elsewhere. */
import type { Histogram } from '../adapters/wire/series.ts'
import type { KeyCounts } from './http/keys/rates.ts'
import type { Admission } from './pipeline/index.ts'

export interface GatewayParts {
  /** @default it bounds the work in flight here */
  readonly Admission?: typeof Admission
  /** What calls to nodes take. @default the gateway's own histogram */
  readonly stages?: Pick<Histogram, 'record'>
  /** Requests in flight. @default those of this process */
  readonly inFlight?: () => number
  /** Where named keys are counted. @default here */
  readonly keys?: KeyCounts
}
