/** Calls between the primary and a worker, over the channel that Node.js gives both. */

/** What one side may ask of the other: each call has one value, and an answer. */
export type Calls<T> = { readonly [name in keyof T]: (value: never) => unknown }

type Given<F> = F extends (value: infer V) => unknown ? V : never
type Answered<F> = F extends (value: never) => infer R ? Awaited<R> : never

type Message = { readonly epd: 'call', readonly id?: number, readonly name: string, readonly value: unknown } | { readonly epd: 'answer', readonly id: number, readonly value?: unknown, readonly error?: string }

export class Channel<Theirs extends Calls<Theirs>, Ours extends Calls<Ours>> {
  readonly #send: (message: object) => void
  readonly #ours: Ours
  readonly #pending = new Map<number, { resolve: (value: unknown) => void, reject: (error: Error) => void }>()
  #calls = 0
  #closed: Error | undefined

  constructor (send: (message: object) => void, ours: Ours) {
    this.#send = send
    this.#ours = ours
  }

  /** No answer is waited for. */
  tell<K extends keyof Theirs & string> (name: K, value: Given<Theirs[K]>): void {
    if (this.#closed === undefined) this.#send({ epd: 'call', name, value } satisfies Message)
  }

  async call<K extends keyof Theirs & string> (name: K, value: Given<Theirs[K]>): Promise<Answered<Theirs[K]>> {
    if (this.#closed !== undefined) throw this.#closed
    const id = this.#calls++
    const answer = new Promise<unknown>((resolve, reject) => { this.#pending.set(id, { resolve, reject }) })
    this.#send({ epd: 'call', id, name, value } satisfies Message)
    return await answer as Answered<Theirs[K]>
  }

  /** Takes what has come; other libraries' messages are none of ours. */
  receive (message: unknown): void {
    if (typeof message !== 'object' || message === null || !('epd' in message)) return
    const ours = message as Message
    if (ours.epd === 'call') this.#answer(ours)
    else {
      const pending = this.#pending.get(ours.id)
      this.#pending.delete(ours.id)
      if (ours.error === undefined) pending?.resolve(ours.value)
      else pending?.reject(new Error(ours.error))
    }
  }

  /** The other side is gone: calls in flight are rejected, later ones too. */
  close (reason: Error): void {
    this.#closed = reason
    for (const { reject } of this.#pending.values()) reject(reason)
    this.#pending.clear()
  }

  async #answer ({ id, name, value }: Message & { epd: 'call' }): Promise<void> {
    const handler = this.#ours[name as keyof Ours] as unknown as (value: unknown) => unknown
    let answer: Pick<Message & { epd: 'answer' }, 'value' | 'error'>
    try {
      answer = { value: await handler.call(this.#ours, value) }
    } catch (err) {
      answer = { error: (err as Error).message }
    }
    if (id !== undefined && this.#closed === undefined) this.#send({ epd: 'answer', id, ...answer } satisfies Message)
  }
}
