import { BlockPool, LeaseTable, type Lease, type LeaseEnd, type PullTicket } from '../../engines/cache/index.ts'
import { P2PNode, type LeaseName, type P2PNodeOptions, type ServedPull } from '../../engines/p2p/index.ts'

export const BLOCK_BYTES = 16 << 10
/** All bits but one of the exponent: any number with it is finite. */
const FINITE = ~0x40000000

export interface PeerOptions extends Partial<Omit<P2PNodeOptions, 'pools' | 'leases'>> {
  blocks?: number
  hiddenSize?: number
}

/** Leased blocks at a producer, with what a consumer has to name to pull them. */
export interface Offer {
  lease: Lease
  name: LeaseName
  blocks: number[]
  ends: LeaseEnd[]
}

/** Tells a test how many pulls run just now, and how often a peer asked to end a lease. */
class WatchedLeases extends LeaseTable {
  running = 0
  asked = 0

  override end (id: string, reason: LeaseEnd): boolean {
    this.asked++
    return super.end(id, reason)
  }

  override beginPull (id: string, epoch: number): PullTicket | 'STALE' | 'GONE' {
    const ticket = super.beginPull(id, epoch)
    if (typeof ticket !== 'string') this.running++
    return ticket
  }

  override endPull (ticket: PullTicket): void {
    this.running--
    super.endPull(ticket)
  }
}

/** An engine's end of the P2P link without the engine: pools, leases and a node. */
export class Peer {
  readonly id: string
  readonly feature: BlockPool
  readonly kv: BlockPool
  readonly leases: WatchedLeases
  readonly served: ServedPull[] = []
  node!: P2PNode

  private constructor (id: string, epoch: number, blocks: number) {
    this.id = id
    this.feature = new BlockPool({ name: 'feature', numBlocks: blocks, blockBytes: BLOCK_BYTES })
    this.kv = new BlockPool({ name: 'kv', numBlocks: 64, blockBytes: 4096 })
    this.leases = new WatchedLeases(epoch)
  }

  static async open (id: string, options: PeerOptions = {}): Promise<Peer> {
    const { blocks = 1024, hiddenSize = 256, epoch = 1, ...rest } = options
    const peer = new Peer(id, epoch, blocks)
    peer.node = await P2PNode.open({
      engineId: id,
      epoch,
      pools: {
        feature: { pool: peer.feature, shape: { block_tokens: 16, hidden_size: hiddenSize, dtype: 'float32' } },
        kv: { pool: peer.kv, shape: { block_tokens: 4, layers: 2, kv_heads: 2, head_dim: 32, dtype: 'float32' } }
      },
      leases: peer.leases,
      fingerprint: 'tiny',
      heartbeatMs: 200,
      onServed: (pull) => peer.served.push(pull),
      ...rest
    })
    return peer
  }

  /** Fills blocks, scattered over the pool, with bytes derived from `seed`, and opens a lease on them. */
  offer (count: number, { seed = 1, ttlMs = 60_000, pool = 'feature' as 'feature' | 'kv', filled = undefined as Promise<void> | undefined } = {}): Offer {
    const source = this[pool]
    const taken = source.allocate(2 * count) as number[]
    const blocks = taken.filter((_, at) => at % 2 === 0 || at % 5 === 0).slice(0, count)
    source.release(taken.filter((id) => !blocks.includes(id)))
    blocks.forEach((id, at) => source.bytes(id).set(pattern(source.blockBytes, seed, at)))
    const ends: LeaseEnd[] = []
    const lease = this.leases.open({
      consumer: 'test',
      pool,
      blocks,
      ttlMs,
      filled,
      onEnd: (reason) => {
        ends.push(reason)
        source.release(blocks)
      }
    })
    return { lease, name: { engineId: this.id, epoch: this.leases.epoch, lease: lease.id }, blocks, ends }
  }

  /** True when these local blocks hold what an offer with that seed held. */
  holds (blocks: readonly number[], seed = 1, pool: 'feature' | 'kv' = 'feature'): boolean {
    const target = this[pool]
    return blocks.every((id, at) => Buffer.from(target.bytes(id)).equals(pattern(target.blockBytes, seed, at)))
  }

  get idle (): boolean {
    return this.leases.openCount === 0 && this.feature.free === this.feature.total && this.kv.free === this.kv.total
  }

  async close (): Promise<void> {
    await this.node.close()
    this.leases.close()
  }
}

export function pattern (bytes: number, seed: number, at: number): Buffer {
  const words = new Uint32Array(bytes / 4)
  for (let i = 0; i < words.length; i++) words[i] = (Math.imul(i + 1, 2654435761) + seed * 97 + at * 31) & FINITE
  return Buffer.from(words.buffer)
}
