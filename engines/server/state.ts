import type { EngineService } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'
import type { InFlight } from './in-flight.ts'
import type { EngineMetrics } from './metrics.ts'

/** What the routes share. */
export interface ServerState {
  readonly health: Health
  readonly inFlight: InFlight
  /** Undefined until the engine exists. */
  metrics: EngineMetrics | undefined
  /** Own URL, which is the engine id; known once the server listens. */
  url: string
}

type HealthStatus = 'initialising' | 'healthy' | 'draining'

const MESSAGES: Readonly<Record<HealthStatus, string>> = {
  initialising: 'The engine is loading its model.',
  healthy: 'The engine takes requests.',
  draining: 'The engine is ending: requests in flight finish, new ones are refused.'
}

/** The state that GET /health answers, and the engine once it exists. */
export class Health {
  #status: HealthStatus = 'initialising'
  #engine: EngineService | undefined

  get status (): HealthStatus { return this.#status }
  get message (): string { return MESSAGES[this.#status] }
  /** Defined once it is made, also while it gets ready. */
  get engine (): EngineService | undefined { return this.#engine }

  started (engine: EngineService): void { this.#engine = engine }
  ready (): void { if (this.#status === 'initialising') this.#status = 'healthy' }
  drain (): void { this.#status = 'draining' }

  /** The engine for a new request. @throws EngineError `initialising` or `draining` */
  serving (): EngineService {
    if (this.#status === 'healthy' && this.#engine !== undefined) return this.#engine
    throw new EngineError(this.#status === 'draining' ? 'draining' : 'initialising', this.message)
  }

  /** The engine for control calls. A draining engine still answers them, because peers end their leases and links. @throws EngineError `initialising` */
  control (): EngineService {
    if (this.#engine !== undefined && this.#status !== 'initialising') return this.#engine
    throw new EngineError('initialising', MESSAGES.initialising)
  }
}
