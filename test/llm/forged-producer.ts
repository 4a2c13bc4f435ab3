import { randomBytes } from 'node:crypto'
import type { Test } from 'tap'
import { BlockPool, LeaseTable } from '../../engines/cache/index.ts'
import type { EncoderResultWire, MigrationRequestWire } from '../../adapters/wire/results.ts'
import type { LlmService } from '../../engines/llm/index.ts'
import { P2PNode, type P2PPool, type PoolInfo } from '../../engines/p2p/index.ts'

type Fill = (values: Float32Array) => void

/** An engine's end of a link that offers whatever it is given in place of features, or of keys and values. */
export class ForgedProducer {
  readonly #node: P2PNode
  readonly #pool: BlockPool
  readonly #leases: LeaseTable
  /** What its consumer is answered when it asks about an offer. */
  readonly offers = new Map<string, object>()
  readonly id: string

  private constructor (node: P2PNode, pool: BlockPool, leases: LeaseTable, id: string) {
    this.#node = node
    this.#pool = pool
    this.#leases = leases
    this.id = id
  }

  /** Linked to `consumer`, as a producer of its `feature` or `kv` blocks. */
  static async link (t: Test, consumer: LlmService, name: 'feature' | 'kv'): Promise<ForgedProducer> {
    const { block_bytes: blockBytes, num_blocks: _, ...shape } = consumer.info()[name] as unknown as PoolInfo
    const pool = new BlockPool({ name, numBlocks: 64, blockBytes })
    const leases = new LeaseTable(randomBytes(4).readUInt32LE())
    const id = `http://forged-${leases.epoch}`
    const offered: P2PPool = { pool, shape }
    const node = await P2PNode.open({ engineId: id, epoch: leases.epoch, pools: { [name]: offered }, leases, offers: { get: lease => producer.offers.get(lease) }, fingerprint: consumer.model.fingerprint, ipc: false })
    t.teardown(async () => {
      await node.close()
      leases.close()
    })
    const producer = new ForgedProducer(node, pool, leases, id)
    await consumer.p2p.connect(node.endpoint)
    await node.connect(consumer.p2p.endpoint)
    return producer
  }

  #offer (count: number, fill: Fill, filled?: Promise<void>): { remote_engine_id: string, epoch: number, lease: string, remote_session_id: number, remote_block_ids: number[] } {
    const blocks = this.#pool.allocate(count) as number[]
    for (const block of blocks) {
      const bytes = this.#pool.bytes(block)
      fill(new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4))
    }
    const { id, sessionId } = this.#leases.open({ consumer: '', pool: this.#pool.name, blocks, filled, ttlMs: 60_000, onEnd: () => { this.#pool.release(blocks) } })
    return { remote_engine_id: this.id, epoch: this.#leases.epoch, lease: id, remote_session_id: sessionId, remote_block_ids: blocks }
  }

  /** An encoder result like `honest`, hash and all unless another is given, with other features. */
  result (honest: EncoderResultWire, fill: Fill, contentHash = honest.content_hash): EncoderResultWire {
    return { ...honest, content_hash: contentHash, ...this.#offer(honest.remote_block_ids.length, fill) }
  }

  /** Offers its consumer features like `honest` that are there when `filled` says so. `told` is what it says when it is asked. */
  ahead (consumer: LlmService, honest: EncoderResultWire, filled: Promise<void>, told: object = {}): string {
    const offer = { ...honest, ...this.#offer(honest.remote_block_ids.length, values => { values.fill(0) }, filled), ...told }
    this.offers.set(offer.lease, offer)
    this.#node.offer(consumer.p2p.endpoint.engine, offer.lease)
    return offer.lease
  }

  end (lease: string): void {
    this.#leases.end(lease, 'release')
  }

  async close (): Promise<void> {
    await this.#node.close()
  }

  /** A migration request like `honest`, tokens and all, with other keys and values. */
  migration (honest: MigrationRequestWire, fill: Fill): MigrationRequestWire {
    return { ...honest, ...this.#offer(honest.remote_block_ids.length, fill) }
  }

  get idle (): boolean {
    return this.#leases.openCount === 0
  }
}
