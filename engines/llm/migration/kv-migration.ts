import type { Attributes } from '@opentelemetry/api'
import { ATTR } from '../../../adapters/wire/semconv.ts'
import { BlockLink, NOTHING_FETCHED, type BlockLinkOptions, type FetchCall } from './block-link.ts'
import { transferAttributes, type MigrationPath } from './migration-loop.ts'
import type { WaitOptions } from '../../cache/room-queue.ts'
import type { Sequence } from '../sequence/sequence.ts'
import { finishMigration, lockMigration, startMigration } from '../sequence/states.ts'
import type { MigrationRequest } from '../sequence/remote.ts'

export interface KvMigrationOptions extends BlockLinkOptions {
  /** KV blocks for the prompt; resolves with how many leading ones are in the prefix cache. */
  readonly reserve: (sequence: Sequence, options: WaitOptions) => Promise<number>
  readonly blockTokens: number
  /** How long to wait for KV blocks, milliseconds. */
  readonly roomTimeoutMs: number
}

/**
 * P -> D: WAITING_MIGRATION to MIGRATION_DONE, by pulling the keys and values of the prompt. Leading blocks that are in
 * this engine's prefix cache are not pulled again; the lease is ACKed all the same, which is what frees P's copy. On
 * failure the lease is left alone: the request may be tried on another engine.
 */
export class KvMigration implements MigrationPath<number> {
  readonly pool = 'kv'
  readonly moves = { start: startMigration, lock: lockMigration, finish: finishMigration }
  readonly #options: KvMigrationOptions
  readonly #link: BlockLink

  constructor (options: KvMigrationOptions) {
    this.#options = options
    this.#link = new BlockLink('kv', options)
  }

  /** How many leading blocks are here already. */
  async claim (sequence: Sequence, signal: AbortSignal): Promise<number> {
    return await this.#options.reserve(sequence, { signal, timeoutMs: this.#options.roomTimeoutMs })
  }

  /** The blocks are the sequence's own and are freed with it. */
  drop (): void {}

  async fetch (sequence: Sequence, found: number, call: FetchCall): Promise<Attributes> {
    const request = sequence.migration as MigrationRequest
    const blocks = request.blocks.slice(found)
    const fetched = blocks.length === 0 ? NOTHING_FETCHED : await this.#link.pull({ ...request, blocks }, sequence.blocks.slice(found), undefined, call)
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
