import type { Dispatcher } from 'undici'
import type { IncomingHttpHeaders } from 'node:http'
import type { TimeLimit } from '../../adapters/abort.ts'
import type { Log } from '../../adapters/adapter.ts'
import type { Body } from '../body/index.ts'
import type { Bypass, ResolvedOptions } from '../options/index.ts'
import type { RegistryApi } from '../registry/index.ts'
import type { GatewayMetrics } from '../telemetry/metrics.ts'
import type { Tracing } from '../telemetry/tracing.ts'
import type { Admission } from './admission.ts'
import type { Answer } from './answer-stream.ts'
import type { Callers } from './callers.ts'
import type { InFlight } from './in-flight.ts'
import type { Stats } from './stats.ts'
import type { Timings } from './timing.ts'

/** What a request shares with all others. */
export interface Core {
  readonly registry: RegistryApi
  readonly dispatcher: Dispatcher
  readonly options: Pick<ResolvedOptions, 'bypass' | 'overlap' | 'routing' | 'sse' | 'timeouts' | 'retries'>
  readonly admission: Admission
  readonly stats: Stats
  /** Defined when pictures may be shown to operators. */
  readonly thumbnails?: { keep (traceId: string, body: Body): void } | undefined
  readonly metrics: GatewayMetrics
  readonly tracing: Tracing
  readonly requests: InFlight
  readonly callers: Callers
  readonly timings: Timings
  readonly mediaCheck: { check (body: Body, signal: TimeLimit): Promise<Body> }
  /** For calls: the header that breaks rings, and those of the client that are forwarded. Throws when the request has passed here before. */
  via (headers: IncomingHttpHeaders): Readonly<Record<string, string>>
}

/** Who asks, where keys have names. */
export interface KeyHolder {
  readonly name: string
  /** Higher goes first. */
  readonly priority: number
}

/** One request for the gateway's core. */
export interface GatewayRequest {
  readonly body: Body
  /** Path below a node's URL, with query: `/v1/chat/completions`. */
  readonly path: string
  /** For joining logs; sent on as x-request-id. */
  readonly id: string
  /** When its body began to arrive, on the clock of `performance.now()`. @default now */
  readonly arrivedAt?: number | undefined
  /** The client's headers, for their trace context. None is forwarded as it is. */
  readonly headers: IncomingHttpHeaders
  /** Registers what happens when the client leaves before its answer is whole; at once when it has left. Not an AbortSignal, which costs as much as the plan. */
  onClientGone (listener: () => void): void
  readonly log: Log
  /** Separates encoder caches of different customers. */
  readonly tenant?: string | undefined
  readonly holder?: KeyHolder | undefined
  /** Overrides the option. */
  readonly bypass?: Bypass | undefined
}

/** Sends an answer to the client, `headers` beside its own, and reads it to its end or destroys it. */
export type Deliver = (answer: Answer, headers: Record<string, string>) => void
