import type { EngineService } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'
import type { InFlight } from './in-flight.ts'
import type { EngineMetrics } from './metrics.ts'

/** What the routes share. */
export interface ServerState {
  readonly health: Health
  readonly inFlight: InFlight
  /** Engine ids of linked peers by the URLs under which gateways know them, where these differ. */
  readonly names: Map<string, string>
  /** Undefined until the engine exists. */
  metrics: EngineMetrics | undefined
  /** Own URL, which is the engine id; known once the server listens. */
  url: string
}

type HealthStatus = 'initialising' | 'healthy' | 'recovering' | 'draining'

const MESSAGES: Readonly<Record<HealthStatus, string>> = {
  initialising: 'The engine is loading its model.',
  healthy: 'The engine takes requests.',
  recovering: 'A part of the engine has ended and is being started anew.',
  draining: 'The engine is ending: requests in flight finish, new ones are refused.'
}

/** The state that GET /health answers, and the engine once it exists. */
export class Health {
  #status: Exclude<HealthStatus, 'recovering'> = 'initialising'
  #engine: EngineService | undefined

  get status (): HealthStatus {
    return this.#status === 'healthy' && this.#engine?.problem !== undefined ? 'recovering' : this.#status
  }

  get message (): string {
    const { status } = this
    return (status === 'recovering' ? this.#engine?.problem : undefined) ?? MESSAGES[status]
  }

  /** Defined once it is made, also while it gets ready. */
  get engine (): EngineService | undefined { return this.#engine }

  started (engine: EngineService): void { this.#engine = engine }
  ready (): void { if (this.#status === 'initialising') this.#status = 'healthy' }
  drain (): void { this.#status = 'draining' }

  /** The engine for a new request. @throws EngineError `initialising` or `draining` */
  serving (): EngineService {
    const { status } = this
    if (status === 'healthy' && this.#engine !== undefined) return this.#engine
    throw new EngineError(status === 'draining' ? 'draining' : 'initialising', this.message)
  }

  /** The engine for control calls. A draining engine still answers them, because peers end their leases and links. @throws EngineError `initialising` */
  control (): EngineService {
    if (this.#engine !== undefined && this.#status !== 'initialising') return this.#engine
    throw new EngineError('initialising', MESSAGES.initialising)
  }
}
