import { createHash } from 'node:crypto'

export interface ContentKey {
  readonly fingerprint: string
  /** Identity of the vision weights. */
  readonly vision: string
  readonly settings: string
  readonly tenant: string
}

/**
 * The only key of feature caches: over the media bytes and everything that decides what features they become, and
 * whose they are. 64 hex digits.
 */
export function contentHash (bytes: Uint8Array, key: ContentKey): string {
  // JSON keeps the parts apart: no two keys give the same text.
  return createHash('sha256').update(JSON.stringify([key.fingerprint, key.vision, key.settings, key.tenant])).update('\n').update(bytes).digest('hex')
}

interface Consumer<T> {
  resolve (value: T): void
  reject (reason: unknown): void
}

interface Flight<T> {
  readonly controller: AbortController
  readonly consumers: Set<Consumer<T>>
  /** Never rejects. */
  settled: Promise<void>
}

export interface FlightPlan<T> {
  /** Does it once for all; its signal aborts when the last consumer has left. */
  work (signal: AbortSignal): Promise<T>
  /** Called for each consumer still there when the work is done: the place to take a reference. */
  hold (value: T): void
  /** Called once, after every consumer holds the value: the place to give up the work's own reference. */
  done (value: T): void
}

/** Work that is done once for all consumers that ask for the same key while it runs. Each consumer can leave alone. */
export class Flights<T> {
  readonly #flights = new Map<string, Flight<T>>()

  get size (): number {
    return this.#flights.size
  }

  /** Is there one to join? */
  has (key: string): boolean {
    return this.#flights.get(key)?.controller.signal.aborted === false
  }

  /** When the flight of this key was given up but has not ended yet: resolves at its end. */
  ending (key: string): Promise<void> | undefined {
    const flight = this.#flights.get(key)
    return flight?.controller.signal.aborted === true ? flight.settled : undefined
  }

  /** Joins the flight of this key or starts it. A consumer that leaves is rejected at once with its signal's reason. */
  join (key: string, signal: AbortSignal, plan: FlightPlan<T>): Promise<T> {
    if (signal.aborted) return Promise.reject(signal.reason)
    const flight = this.#flights.get(key) ?? this.#start(key, plan)
    return new Promise<T>((resolve, reject) => {
      const onAbort = (): void => {
        flight.consumers.delete(consumer)
        reject(signal.reason)
        if (flight.consumers.size === 0) flight.controller.abort(signal.reason)
      }
      const stay = (): void => signal.removeEventListener('abort', onAbort)
      const consumer: Consumer<T> = {
        resolve: value => {
          stay()
          plan.hold(value)
          resolve(value)
        },
        reject: reason => {
          stay()
          reject(reason)
        }
      }
      flight.consumers.add(consumer)
      signal.addEventListener('abort', onAbort, { once: true })
    })
  }

  #start (key: string, plan: FlightPlan<T>): Flight<T> {
    const flight: Flight<T> = { controller: new AbortController(), consumers: new Set(), settled: Promise.resolve() }
    this.#flights.set(key, flight)
    flight.settled = plan.work(flight.controller.signal).then(
      value => {
        this.#flights.delete(key)
        for (const consumer of flight.consumers) consumer.resolve(value)
        plan.done(value)
      },
      (reason: unknown) => {
        this.#flights.delete(key)
        for (const consumer of flight.consumers) consumer.reject(reason)
      }
    )
    return flight
  }
}
