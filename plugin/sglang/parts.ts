/** What language servers wait for: the parts of each of their requests. */
import { requestIdOf } from '../../adapters/sglang/encoder.ts'
import type { AdapterNode } from '../../adapters/adapter.ts'

/** Longer than SGLang waits for anything (180 s), in milliseconds. */
export const REMEMBERED_MS = 200_000

/** One run of pictures of a request: a call of POST /encode, and those about it, which may come before. */
export class Part {
  readonly id: string
  readonly group: Group
  /** Bodies of /scheduler_receive_url, one for each rank of the language server. */
  readonly receivers: object[] = []
  /** Passes on a receiver that comes late; undefined while receivers are held back. */
  forward: ((receiver: object) => void) | undefined
  /** The encoder that has the part, and the part's id there. */
  pin: { readonly node: AdapterNode, readonly id: string } | undefined
  /** `lost`: its encoder broke when it had the receivers, so that the embeddings may have arrived or not. */
  state: 'new' | 'encoding' | 'lost' | 'delivered' = 'new'
  /** Its language server has closed the call of POST /encode. */
  hungUp = false

  constructor (id: string, group: Group) {
    this.id = id
    this.group = group
  }

  receive (receiver: object): void {
    this.receivers.push(receiver)
    this.forward?.(receiver)
  }
}

/** The parts of one request. */
class Group {
  readonly parts = new Map<string, Part>()
  readonly since = performance.now()
  /** How many there are; known from the first encode call on. */
  total = Infinity
  readonly #listeners = new Set<() => void>()

  changed (): void {
    for (const listener of this.#listeners) listener()
  }

  /** Resolves when `check` holds. */
  when (check: () => boolean): Promise<void> {
    return new Promise(resolve => {
      const look = (): void => {
        if (!check()) return
        this.#listeners.delete(look)
        resolve()
      }
      this.#listeners.add(look)
      look()
    })
  }

  /**
   * Resolves when no other part is on its way. A language server takes a part that comes twice for an error while it waits
   * for others; once it has all, it drops it.
   */
  othersSettled (part: Part): Promise<void> {
    const settled = ({ state }: Part): boolean => state === 'delivered' || state === 'lost'
    return this.when(() => this.parts.size >= this.total && [...this.parts.values()].every(other => other === part || settled(other)))
  }

  get delivered (): boolean {
    return this.parts.size >= this.total && [...this.parts.values()].every(({ state }) => state === 'delivered')
  }
}

export class Parts {
  readonly #groups = new Map<string, Group>()

  get (id: string): Part {
    this.#forget()
    const request = requestIdOf(id)
    let group = this.#groups.get(request)
    if (group === undefined) this.#groups.set(request, group = new Group())
    let part = group.parts.get(id)
    if (part === undefined) group.parts.set(id, part = new Part(id, group))
    return part
  }

  /** The request of this part has all it needs. */
  delete (part: Part): void {
    const request = requestIdOf(part.id)
    if (this.#groups.get(request) === part.group) this.#groups.delete(request)
  }

  get size (): number {
    return this.#groups.size
  }

  /** Of requests that were given up half-way. They stand in order of age. */
  #forget (): void {
    const before = performance.now() - REMEMBERED_MS
    for (const [request, { since }] of this.#groups) {
      if (since >= before) return
      this.#groups.delete(request)
    }
  }
}
