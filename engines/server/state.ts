import type { Health } from './health.ts'
import type { InFlight } from './in-flight.ts'
import type { EngineMetrics } from './metrics.ts'

/** What the routes share. */
export interface ServerState {
  readonly health: Health
  readonly inFlight: InFlight
  /** There once the engine is. */
  metrics: EngineMetrics | undefined
  /** Own URL, which is the engine id; known once the server listens. */
  url: string
}
