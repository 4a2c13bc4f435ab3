import type { Attributes } from '@opentelemetry/api'
import { ATTR } from '../../../adapters/wire/semconv.ts'
import { BlockLink, NOTHING_FETCHED, type BlockLinkOptions, type FetchCall } from './block-link.ts'
import { transferAttributes, type MigrationPath } from './migration-loop.ts'
import { Semaphore } from '../../service/waiting.ts'
import type { WaitOptions } from '../../cache/room-queue.ts'
import type { Sequence } from '../sequence/sequence.ts'
import { finishMigration, lockMigration, startMigration } from '../sequence/states.ts'
import type { MigrationRequest } from '../sequence/prompt.ts'

const MAX_WAITING = 8

export interface KvMigrationOptions extends BlockLinkOptions {
  /** KV blocks for the prompt; resolves with how many leading ones are in the prefix cache. */
  readonly reserve: (sequence: Sequence, options: WaitOptions) => Promise<number>
  readonly blockTokens: number
  /** How long to wait for KV blocks, milliseconds. */
  readonly roomTimeoutMs: number
}

/**
 * P -> D: WAITING_MIGRATION to MIGRATION_DONE, by pulling the keys and values of the prompt. Leading blocks that are in
 * this engine's prefix cache are not pulled again; the lease is ACKed all the same, so that P can free its copy. After a
 * failure the lease stays open, because the gateway may send the request to another engine.
 */
export class KvMigration implements MigrationPath<number> {
  readonly pool = 'kv'
  readonly moves = { start: startMigration, lock: lockMigration, finish: finishMigration }
  readonly #options: KvMigrationOptions
  readonly #link: BlockLink
  /** Those who wait for blocks, each for a bounded time; the others wait for their turn first. */
  readonly #line = new Semaphore(MAX_WAITING)

  constructor (options: KvMigrationOptions) {
    this.#options = options
    this.#link = new BlockLink('kv', options)
  }

  /** Resolves with how many leading blocks are cached. */
  async reserve (sequence: Sequence, signal: AbortSignal): Promise<number> {
    const leave = await this.#line.enter(signal)
    try {
      return await this.#options.reserve(sequence, { signal, timeoutMs: this.#options.roomTimeoutMs })
    } finally {
      leave()
    }
  }

  /** Nothing to do: the blocks belong to the sequence and are freed with it. */
  cancel (): void {}

  async fetch (sequence: Sequence, found: number, call: FetchCall): Promise<Attributes> {
    const request = sequence.migration as MigrationRequest
    const blocks = request.blocks.slice(found)
    const fetched = blocks.length === 0 ? NOTHING_FETCHED : await this.#link.inTurn(call.signal, async () => await this.#link.pull({ ...request, blocks }, sequence.blocks.slice(found), undefined, call))
    this.#link.ack(request, call.context)
    return {
      [ATTR.tokens]: sequence.promptLength,
      [ATTR.cached]: found * this.#options.blockTokens,
      ...transferAttributes(new Map([[request.engineId, fetched.bytes]]), fetched.blocks, fetched.link)
    }
  }

  async settled (): Promise<void> {
    await this.#link.settled()
  }
}
