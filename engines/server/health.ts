import type { EngineService } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'

export type HealthStatus = 'initialising' | 'healthy' | 'draining'

const MESSAGES: Readonly<Record<HealthStatus, string>> = {
  initialising: 'The engine is loading its model.',
  healthy: 'The engine takes requests.',
  draining: 'The engine is ending: requests in flight finish, new ones are refused.'
}

/** Where the process is in its life, and the engine once there is one. */
export class Health {
  #status: HealthStatus = 'initialising'
  #engine: EngineService | undefined

  get status (): HealthStatus { return this.#status }
  get message (): string { return MESSAGES[this.#status] }
  /** There from the moment it was made, also while it gets ready. */
  get engine (): EngineService | undefined { return this.#engine }

  started (engine: EngineService): void { this.#engine = engine }
  ready (): void { if (this.#status === 'initialising') this.#status = 'healthy' }
  drain (): void { this.#status = 'draining' }

  /** The engine for a new request. @throws EngineError while there is none, and when no new ones are taken */
  serving (): EngineService {
    if (this.#status === 'healthy' && this.#engine !== undefined) return this.#engine
    throw new EngineError(this.#status === 'draining' ? 'draining' : 'initialising', this.message)
  }

  /** The engine for control calls, which a draining engine still answers: peers end their leases and links. */
  control (): EngineService {
    if (this.#engine !== undefined && this.#status !== 'initialising') return this.#engine
    throw new EngineError('initialising', MESSAGES.initialising)
  }
}
