/** What the gateway measures: distributions, of which a sum would tell too little. Counts are in the pipeline's Stats. */
import { ATTR } from '../../adapters/wire/semconv.ts'
import { Histogram } from '../../adapters/wire/series.ts'

/** Bounds of the GenAI conventions, in seconds; stages begin lower, as a cached encode takes a millisecond. */
const DURATION_BOUNDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
const FIRST_TOKEN_BOUNDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
const PER_TOKEN_BOUNDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
const TOKEN_BOUNDS = Array.from({ length: 14 }, (_, i) => 4 ** i)

/** The labels of a request: the error's only when it has failed; the model only when it is known, as each of a client's inventions would be a series. */
const REQUEST = [ATTR.operation, ATTR.provider, ATTR.requestModel, ATTR.topology, ATTR.errorType] as const

export class GatewayMetrics {
  readonly durations = new Histogram(DURATION_BOUNDS, ...REQUEST)
  /** Streams only, as the two that follow. */
  readonly firstChunks = new Histogram(DURATION_BOUNDS, ...REQUEST)
  readonly firstTokens = new Histogram(FIRST_TOKEN_BOUNDS, ...REQUEST)
  readonly perTokens = new Histogram(PER_TOKEN_BOUNDS, ...REQUEST)
  readonly tokens = new Histogram(TOKEN_BOUNDS, ATTR.operation, ATTR.provider, ATTR.requestModel, ATTR.tokenType)
  readonly stages = new Histogram([0.001, 0.0025, 0.005, ...DURATION_BOUNDS], ATTR.stage, ATTR.node, ATTR.outcome)
  readonly waits = new Histogram(DURATION_BOUNDS, ATTR.outcome)
}
