import { EngineError } from '../service/errors.ts'

/** One request being served. */
export interface Flight {
  readonly signal: AbortSignal
  /** The caller's id, made unique among those in flight. */
  readonly requestId: string
  abort (reason: EngineError): void
  /** Idempotent. */
  end (): void
}

/** How long an abort waits for its request: the two come over different connections, so the abort may arrive first. */
const OVERTAKEN_MS = 30_000
const MAX_OVERTAKEN = 1_024
const ABORTED = (): EngineError => new EngineError('cancelled', 'The request was aborted.')

/** The requests in flight: what a graceful end waits for, and what POST /abort_request finds by id. */
export class InFlight {
  readonly #flights = new Map<string, Flight>()
  /** Ids aborted before their request arrived, with the time of the abort, oldest first. */
  readonly #overtaken = new Map<string, number>()
  #idle: Array<() => void> = []

  get size (): number { return this.#flights.size }

  start (callerId: string): Flight {
    const controller = new AbortController()
    const requestId = this.#unique(callerId)
    const flight: Flight = {
      signal: controller.signal,
      requestId,
      abort: reason => { controller.abort(reason) },
      end: () => {
        if (this.#flights.delete(requestId) && this.#flights.size === 0) this.#idle.splice(0).forEach(resolve => { resolve() })
      }
    }
    this.#flights.set(requestId, flight)
    if (this.#wasOvertaken(callerId)) flight.abort(ABORTED())
    return flight
  }

  /** Aborts all requests with this id, which a gateway sends with each of its calls. Returns their unique ids. */
  abort (callerId: string): string[] {
    return this.#abortWhere(id => id === callerId || id.startsWith(callerId + '#'))
  }

  /** Aborts a request that has not arrived yet: it ends when it arrives. */
  expect (callerId: string): void {
    this.#overtaken.delete(callerId)
    this.#overtaken.set(callerId, performance.now())
    for (const [id, since] of this.#overtaken) {
      if (this.#overtaken.size <= MAX_OVERTAKEN && performance.now() - since <= OVERTAKEN_MS) break
      this.#overtaken.delete(id)
    }
  }

  abortAll (): string[] {
    return this.#abortWhere(() => true)
  }

  /** Resolves when nothing is in flight: true, or false after `ms`. */
  async idle (ms: number): Promise<boolean> {
    if (this.#flights.size === 0) return true
    let timer: NodeJS.Timeout | undefined
    try {
      return await Promise.race([
        new Promise<boolean>(resolve => { this.#idle.push(() => { resolve(true) }) }),
        new Promise<boolean>(resolve => { timer = setTimeout(resolve, ms, false) })
      ])
    } finally {
      clearTimeout(timer)
    }
  }

  #abortWhere (wanted: (id: string) => boolean): string[] {
    const found = [...this.#flights.values()].filter(flight => wanted(flight.requestId))
    for (const flight of found) flight.abort(ABORTED())
    return found.map(flight => flight.requestId)
  }

  /** True once: a later request with the id is another one. */
  #wasOvertaken (callerId: string): boolean {
    const since = this.#overtaken.get(callerId)
    this.#overtaken.delete(callerId)
    return since !== undefined && performance.now() - since <= OVERTAKEN_MS
  }

  #unique (callerId: string): string {
    if (!this.#flights.has(callerId)) return callerId
    let n = 2
    while (this.#flights.has(`${callerId}#${n}`)) n++
    return `${callerId}#${n}`
  }
}
