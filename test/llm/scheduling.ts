/** Sequences and a scheduler without engine, runner or model; a test moves them by hand. */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { BlockPool } from '../../engines/cache/index.ts'
import { BlockManager } from '../../engines/llm/blocks/block-manager.ts'
import { GREEDY } from '../../engines/llm/sequence/sampling.ts'
import { Scheduler, type SchedulerOptions } from '../../engines/llm/scheduler/scheduler.ts'
import { Sequence, type SequenceInit, type SequenceState } from '../../engines/llm/sequence/sequence.ts'
import { finishMigration, lock, lockMigration, startMigration, unlock } from '../../engines/llm/sequence/states.ts'

/** Tokens of a block. */
export const BLOCK = 4

let lastId = 0

export function sequence (prompt: readonly number[], init: Partial<SequenceInit> = {}, state: SequenceState = 'WAITING'): Sequence {
  return new Sequence({
    id: ++lastId,
    requestId: 'r',
    tokens: prompt,
    positions: { axes: 1, values: Int32Array.from(prompt.keys()), next: prompt.length },
    spans: [],
    media: [],
    cacheSalt: '',
    sampling: GREEDY,
    maxTokens: 100,
    context: ROOT_CONTEXT,
    sink: { onToken: () => false, onEnd: () => {} },
    ...init
  }, state)
}

/** A sequence that is to bring its keys and values, and `first` as P's token. */
export function migrating (prompt: readonly number[], first = 7, init: Partial<SequenceInit> = {}): Sequence {
  const remote = { engineId: 'http://p', epoch: 1, lease: 'l', blocks: [] }
  const migration = { ...remote, tokens: prompt, next: prompt.length, media: [], spans: [], cachedTokens: 0, first: { token: first } }
  const one = sequence(prompt, { migration, ...init }, 'WAITING_MIGRATION')
  startMigration(one)
  return one
}

/** The pull has ended: every block that was not found holds its sequence's id. */
export function arrive (s: Scheduler, one: Sequence, found: number): void {
  lockMigration(one)
  for (const block of one.blocks.slice(found)) s.blocks.pool.bytes(block).fill(one.id)
  finishMigration(one)
  s.add(one)
}

export function count (from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, i) => from + i)
}

export function manager (blocks: number, caching = true): BlockManager {
  return new BlockManager(new BlockPool({ name: 'kv', numBlocks: blocks, blockBytes: 8 }), { caching })
}

export function scheduler (blocks: number, options: Partial<SchedulerOptions> & { caching?: boolean } = {}): Scheduler {
  const { caching = true, ...rest } = options
  return new Scheduler(manager(blocks, caching), { blockTokens: BLOCK, maxBatchSize: 8, maxPrefillTokens: 16, ...rest })
}

/** Carries out one plan; every sequence gets the token `next` says. */
export function step (s: Scheduler, next: (sequence: Sequence) => number = () => 7): { kind: string, ids: number[], tokens: number } | undefined {
  const plan = s.schedule()
  if (plan === undefined) return undefined
  s.checkIntegrity()
  if (plan.kind === 'prefill') {
    for (const chunk of plan.chunks) {
      lock(chunk.sequence)
      unlock(chunk.sequence)
      s.prefilled(chunk)
    }
    return { kind: 'prefill', ids: plan.chunks.map(c => c.sequence.id), tokens: plan.chunks.reduce((n, c) => n + c.count, 0) }
  }
  if (plan.kind === 'join') return { kind: 'join', ids: plan.sequences.map(one => one.id), tokens: 0 }
  for (const one of plan.sequences) {
    lock(one)
    unlock(one)
    s.decoded(one, next(one))
  }
  return { kind: 'decode', ids: plan.sequences.map(one => one.id), tokens: plan.sequences.length }
}
