import type { AdapterNode } from '../adapter.ts'

/** Items remembered of one encoder. */
const MAX = 16_384
/** Milliseconds after which the encoder is asked again. */
const AGE_MS = 30 * 60_000

/**
 * What each encoder has encoded, as far as the gateway knows: a repeated picture needs no call. A file may be gone all
 * the same, and the language model then encodes the picture itself. Kept by the probe's answer, which is another object
 * once the process has restarted.
 */
export class Written {
  readonly #byInfo = new WeakMap<object, Map<string, number>>()
  readonly #now: () => number

  constructor (now: () => number = () => performance.now()) {
    this.#now = now
  }

  has ({ info }: AdapterNode, name: string): boolean {
    const at = info === undefined ? undefined : this.#byInfo.get(info)?.get(name)
    return at !== undefined && this.#now() - at < AGE_MS
  }

  add ({ info }: AdapterNode, name: string): void {
    if (info === undefined) return
    let names = this.#byInfo.get(info)
    if (names === undefined) this.#byInfo.set(info, names = new Map())
    // The oldest come first.
    names.delete(name)
    names.set(name, this.#now())
    if (names.size > MAX) names.delete(names.keys().next().value!)
  }
}
