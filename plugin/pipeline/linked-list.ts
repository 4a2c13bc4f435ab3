/** What a member of a {@link LinkedList} carries; of one list at a time. */
export interface Linked {
  before?: Linked | undefined
  after?: Linked | undefined
}

/**
 * A set for what comes and goes with every request, in order of arrival. A Set would do, but the tables it outgrows are
 * old objects that point to young ones: each keeps what it held from being collected while that is cheap, and under
 * load whole requests with their sockets' buffers move to the old generation.
 */
export class LinkedList<T extends Linked> implements Iterable<T> {
  readonly #end: Linked = {}
  #size = 0

  constructor () {
    this.#end.before = this.#end.after = this.#end
  }

  get size (): number {
    return this.#size
  }

  /** Does nothing for a member. */
  add (item: T): void {
    if (item.after !== undefined) return
    const end = this.#end
    const last = end.before!
    item.before = last
    item.after = end
    last.after = end.before = item
    this.#size++
  }

  /** False when it was no member. */
  delete (item: T): boolean {
    const { before, after } = item
    if (before === undefined || after === undefined) return false
    before.after = after
    after.before = before
    // A link that is left would keep the neighbour alive as long as this one.
    item.before = item.after = undefined
    this.#size--
    return true
  }

  /** The members as they are now, so that they may go meanwhile. */
  [Symbol.iterator] (): Iterator<T> {
    const items: T[] = []
    for (let item = this.#end.after!; item !== this.#end; item = item.after!) items.push(item as T)
    return items.values()
  }
}
