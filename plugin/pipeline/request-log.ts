import type { Log } from '../../adapters/adapter.ts'

/**
 * A request's log with its trace id on every line. Not a child logger: those cost more to make than most requests ever
 * log.
 */
export class RequestLog implements Log {
  readonly #log: Log
  readonly #trace: { readonly traceId: string }

  constructor (log: Log, trace: { readonly traceId: string }) {
    this.#log = log
    this.#trace = trace
  }

  debug (data: object, message: string): void { this.#log.debug(this.#with(data), message) }
  info (data: object, message: string): void { this.#log.info(this.#with(data), message) }
  warn (data: object, message: string): void { this.#log.warn(this.#with(data), message) }
  error (data: object, message: string): void { this.#log.error(this.#with(data), message) }

  #with (data: object): object {
    return { trace_id: this.#trace.traceId, ...data }
  }
}
