/**
 * Why a message of a peer was refused. `malformed`: no message of this protocol; `stale`: of another process or an outdated
 * link; `gone`: the lease has ended or never was; `blocks`: not the lease's; `foreign`: another peer's lease; `replay`: that
 * very pull was made before; `spent`: the lease was pulled as often as one may be; `flood`: too many pulls or offers at once.
 */
export const REFUSALS = ['malformed', 'stale', 'gone', 'blocks', 'foreign', 'replay', 'spent', 'flood'] as const

export type Refusal = typeof REFUSALS[number]

/** Counts refused messages, for both threads: a peer that sends nonsense must not make them exchange messages about it. */
export class Refusals {
  readonly #counts: Int32Array

  constructor (memory: SharedArrayBuffer = new SharedArrayBuffer(4 * REFUSALS.length)) {
    this.#counts = new Int32Array(memory)
  }

  get memory (): SharedArrayBuffer {
    return this.#counts.buffer as SharedArrayBuffer
  }

  add (reason: Refusal): void {
    Atomics.add(this.#counts, REFUSALS.indexOf(reason), 1)
  }

  get counts (): Readonly<Record<Refusal, number>> {
    return Object.fromEntries(REFUSALS.map((reason, i) => [reason, Atomics.load(this.#counts, i)])) as Record<Refusal, number>
  }
}
