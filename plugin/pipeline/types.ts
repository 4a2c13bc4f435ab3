import type { Dispatcher } from 'undici'
import type { IncomingHttpHeaders } from 'node:http'
import type { Log, UpstreamResponse } from '../../adapters/adapter.ts'
import type { Body } from '../body/index.ts'
import type { Bypass, ResolvedOptions } from '../options/index.ts'
import type { RegistryApi } from '../registry/index.ts'
import type { GatewayMetrics } from '../telemetry/metrics.ts'
import type { Admission } from './admission.ts'
import type { Deadlines } from './deadlines.ts'
import type { Linked } from './linked-list.ts'
import type { Stats } from './stats.ts'

/** As much of an AbortSignal as a request needs. */
export interface AbortSignalLike {
  readonly aborted: boolean
  addEventListener (type: 'abort', listener: () => void): void
  removeEventListener (type: 'abort', listener: () => void): void
}

export interface Cancellable extends Linked {
  cancel (reason: unknown): void
}

/** What a request shares with all others. */
export interface Core {
  readonly registry: RegistryApi
  readonly dispatcher: Dispatcher
  readonly options: Pick<ResolvedOptions, 'bypass' | 'routing' | 'timeouts' | 'retries'>
  readonly deadlines: Deadlines
  readonly admission: Admission
  readonly stats: Stats
  /** Defined when pictures may be shown to operators. */
  readonly thumbnails?: { keep (traceId: string, body: Body): void } | undefined
  readonly metrics: Pick<GatewayMetrics, 'request'>
  /** A request is in flight, and can be made to end; then no longer. */
  began (request: Cancellable): void
  ended (request: Cancellable): void
  /** Work that outlives its request, such as releasing leases; `close()` waits for it. */
  background (work: Promise<unknown>): void
}

/** One request for the gateway's core. */
export interface GatewayRequest {
  readonly body: Body
  /** Path below a node's URL, with query: `/v1/chat/completions`. */
  readonly path: string
  /** For joining logs; sent on as x-request-id. */
  readonly id: string
  /** When its body began to arrive, on the clock of `performance.now()`; now when it is not told. */
  readonly arrivedAt?: number | undefined
  /** The client's headers, for their trace context. None is forwarded as it is. */
  readonly headers: IncomingHttpHeaders
  /** Aborts when the client is gone. */
  readonly signal: AbortSignalLike
  readonly log: Log
  /** Separates encoder caches of different customers. */
  readonly tenant?: string | undefined
  /** Overrides the option. */
  readonly bypass?: Bypass | undefined
}

/** How delivering an answer ended, once its first byte was on the way to the client. */
export interface Delivery {
  readonly outcome: 'complete' | 'upstream_failed' | 'client_gone'
  readonly error?: Error | undefined
  readonly statusCode: number
  /** On the clock of `performance.now()`, in milliseconds. */
  readonly firstByteAt?: number | undefined
  readonly usage?: { readonly promptTokens?: number | undefined, readonly completionTokens?: number | undefined, readonly cachedTokens?: number | undefined } | undefined
  readonly finishReason?: string | undefined
}

/** Hands an answer to the client. Rejects only while nothing has reached it, which leaves a retry possible. */
export type Deliver = (upstream: UpstreamResponse, headers: Record<string, string>) => Promise<Delivery>
