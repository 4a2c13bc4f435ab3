/** The receiving end of ECMooncakeConnector: its control socket is real, its memory is this process's. */
import { Reply } from 'zeromq'
import type { Embedding } from './fake-vllm-media.ts'

interface Order { readonly op: string, readonly transfer_id?: string, readonly abandon?: boolean }

/** Of one data-parallel replica. */
export class ReceivePool {
  readonly orders: Order[] = []
  readonly #socket = new Reply({ linger: 0 })
  readonly #pushed = new Map<string, Embedding>()
  readonly #cancelled = new Set<string>()
  #address = ''

  static async listen (t: { teardown: (run: () => void) => void }): Promise<ReceivePool> {
    const pool = new ReceivePool()
    await pool.#socket.bind('tcp://127.0.0.1:*')
    pool.#address = pool.#socket.lastEndpoint!
    pool.#serve().catch(() => {})
    t.teardown(() => { pool.#socket.close() })
    return pool
  }

  get address (): string { return this.#address }
  /** Features that nobody has taken. */
  get waiting (): number { return this.#pushed.size }
  get cancelled (): Order[] { return this.orders.filter(({ op }) => op === 'cancel') }

  push (transfer: string, embedding: Embedding): void {
    if (!this.#cancelled.has(transfer)) this.#pushed.set(transfer, embedding)
  }

  take (transfer: string): Embedding | undefined {
    const embedding = this.#pushed.get(transfer)
    this.#pushed.delete(transfer)
    return embedding
  }

  async #serve (): Promise<void> {
    for await (const [frame] of this.#socket) {
      const order = JSON.parse(frame!.toString()) as Order
      this.orders.push(order)
      await this.#socket.send(JSON.stringify(this.#answer(order)))
    }
  }

  #answer ({ op, transfer_id: transfer }: Order): object {
    if (op === 'peers') return { ok: true, result: { ports: [Number(this.#address.split(':').at(-1))] } }
    if (op !== 'cancel') return { ok: false, error: `unknown control op: '${op}'` }
    this.#cancelled.add(transfer!)
    return { ok: true, result: { cancelled: this.#pushed.delete(transfer!) } }
  }
}
