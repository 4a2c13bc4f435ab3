import type { Context } from '@opentelemetry/api'
import type { PoolName } from '../../cache/index.ts'
import type { WriteGate } from '../../p2p/write-gate.ts'
import type { P2PNode } from '../../p2p/node.ts'
import type { EngineCounters, EngineLog } from '../../service/engine-service.ts'
import { traceparentOf } from '../../service/traceparent.ts'
import { Semaphore } from '../../service/waiting.ts'
import type { RemoteBlocks } from '../sequence/prompt.ts'

export interface BlockLinkOptions {
  readonly p2p: Pick<P2PNode, 'pull' | 'ack'>
  readonly counters: EngineCounters
  readonly log: EngineLog
  /** Pulls at once; the others wait in line. */
  readonly concurrency: number
  /** How long one pull may take, milliseconds. */
  readonly pullTimeoutMs: number
}

export interface FetchCall {
  readonly signal: AbortSignal
  /** Its span is the parent of the producer's span of the transfer. */
  readonly context: Context
  /** Of `P2PNode.pull`. */
  readonly gate?: WriteGate | undefined
}

/** What was transferred. */
export interface Fetched {
  readonly bytes: number
  readonly blocks: number
  /** Transport of the link; undefined when nothing was pulled. */
  readonly link: string | undefined
  /** It had been pulled ahead of the sequence. */
  readonly ahead?: boolean | undefined
}

export const NOTHING_FETCHED: Fetched = { bytes: 0, blocks: 0, link: undefined }

/** Pulls blocks from other engines into the pool of the same name, and ACKs their leases. */
export class BlockLink {
  readonly #pool: PoolName
  readonly #options: BlockLinkOptions
  readonly #acks = new Set<Promise<unknown>>()
  readonly #turns: Semaphore

  constructor (pool: PoolName, options: BlockLinkOptions) {
    this.#pool = pool
    this.#options = options
    this.#turns = new Semaphore(options.concurrency)
  }

  /** Runs `work`, which pulls, when it is its turn. It must wait for no other work that needs a turn. Rejects with the signal's reason while it waits. */
  async inTurn<T> (signal: AbortSignal, work: () => Promise<T>): Promise<T> {
    const leave = await this.#turns.enter(signal)
    try {
      return await work()
    } finally {
      leave()
    }
  }

  /** Pulls `source.blocks` into as many local ones; `bytes` when the last block is not full. Rejects with P2PError. */
  async pull ({ engineId, epoch, lease, blocks }: RemoteBlocks, localBlocks: readonly number[], bytes: number | undefined, { signal, context, gate }: FetchCall): Promise<Fetched> {
    const { p2p, pullTimeoutMs, counters } = this.#options
    const pulled = await p2p.pull({
      engineId, epoch, lease, pool: this.#pool, remoteBlocks: blocks, localBlocks, bytes, signal, traceparent: traceparentOf(context), timeoutMs: pullTimeoutMs, gate
    })
    counters.migratedBytes += pulled.bytes
    return { bytes: pulled.bytes, blocks: blocks.length, link: pulled.transport }
  }

  /** Does not wait for the answer: if the message is lost, the lease expires at the producer. */
  ack ({ engineId, epoch, lease }: RemoteBlocks, context: Context): void {
    const ack = this.#options.p2p.ack({ engineId, epoch, lease }, { traceparent: traceparentOf(context) })
      .catch((err: unknown) => this.#options.log.warn({ err, peer: engineId }, 'ACK failed; the lease will expire'))
      .finally(() => this.#acks.delete(ack))
    this.#acks.add(ack)
  }

  /** Resolves when the ACKs under way have been answered. */
  async settled (): Promise<void> {
    await Promise.all(this.#acks)
  }
}
