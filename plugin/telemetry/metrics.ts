import type { Attributes, Meter } from '@opentelemetry/api'
import { AdapterError, type Stage } from '../../adapters/adapter.ts'
import { ATTR, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { Instruments, type MetricsSource } from './instruments.ts'

/** One request that is over. Times in seconds. */
export interface RequestFacts {
  readonly operation: string
  /** Of a known model only: a client's own invention would become a time series for each. */
  readonly model: string | undefined
  readonly topology: string
  readonly seconds: number
  /** Undefined when it ended well or the client left. */
  readonly errorType?: string | undefined
  /** Streams only. */
  readonly firstChunk?: number | undefined
  /** Mean of the tokens after the first, where the answer says how many there were. */
  readonly perToken?: number | undefined
}

/**
 * The gateway's metrics by the OpenTelemetry API. Most are numbers read at collection; a request records its histograms.
 * Every meter gets them: the gateway's own for GET /metrics, and that of an SDK the application may have (a no-op
 * without).
 */
export class GatewayMetrics {
  readonly #meters: readonly Instruments[]

  constructor (meters: readonly Meter[], source: MetricsSource) {
    this.#meters = meters.map(meter => new Instruments(meter, source))
  }

  request ({ operation, model, topology, errorType, seconds, firstChunk, perToken }: RequestFacts): void {
    const attributes: Attributes = {
      [ATTR.operation]: operation,
      [ATTR.provider]: TRACER_NAME,
      ...(model === undefined ? {} : { [ATTR.requestModel]: model }),
      [ATTR.topology]: topology,
      ...(errorType === undefined ? {} : { [ATTR.errorType]: errorType })
    }
    for (const { durations, firstChunks, perTokens } of this.#meters) {
      durations.record(seconds, attributes)
      if (firstChunk !== undefined) firstChunks.record(firstChunk, attributes)
      if (perToken !== undefined) perTokens.record(perToken, attributes)
    }
  }

  /** A node's use for a stage is over. @param error undefined when it went well */
  stage (node: string, stage: Stage, seconds: number, error: unknown): void {
    const attributes = { [ATTR.stage]: stage, [ATTR.node]: node, [ATTR.outcome]: outcomeOf(error) }
    for (const { stages } of this.#meters) stages.record(seconds, attributes)
  }

  close (): void {
    for (const meter of this.#meters) meter.close()
  }
}

/** A call that was aborted says nothing about the node. */
function outcomeOf (error: unknown): string {
  if (error === undefined) return 'ok'
  return AdapterError.is(error) ? error.code.toLowerCase() : 'aborted'
}
