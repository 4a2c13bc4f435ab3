/**
 * The life of a sequence. It is always in exactly one of these states, and each move has one function here that makes it.
 *
 *   standard   WAITING -> RUNNING -> LOCKED (forward pass) -> RUNNING ...        evicted: RUNNING -> WAITING
 *   E -> PD    WAITING_EPD_MIGRATION -> RUNNING_EPD_MIGRATION -> EPD_MIGRATION_LOCKED -> WAITING
 *   P -> D     WAITING_MIGRATION -> RUNNING_MIGRATION -> MIGRATION_LOCKED -> MIGRATION_DONE -> RUNNING
 *              evicted: RUNNING -> WAITING, its keys and values spilled to host memory
 *   end        RUNNING -> ENDED (stop, length);  any -> STOPPED (cancelled) | ABORTED (error) -> ENDED
 *
 * In a busy state blocks of the sequence are read or written by another thread or another engine. A cancel or an error
 * that arrives there is kept as `interruption` and takes effect on leaving it: nothing is freed under a reader.
 */
import type { Outcome, Sequence, SequenceState } from './sequence.ts'

type Interruption = Extract<Outcome, { kind: 'stopped' | 'aborted' }>

/** Every move there is. */
const MOVES: Readonly<Record<SequenceState, readonly SequenceState[]>> = {
  WAITING: ['RUNNING', 'STOPPED', 'ABORTED'],
  RUNNING: ['LOCKED', 'WAITING', 'ENDED', 'STOPPED', 'ABORTED'],
  LOCKED: ['RUNNING', 'STOPPED', 'ABORTED'],
  WAITING_EPD_MIGRATION: ['RUNNING_EPD_MIGRATION', 'STOPPED', 'ABORTED'],
  RUNNING_EPD_MIGRATION: ['EPD_MIGRATION_LOCKED', 'STOPPED', 'ABORTED'],
  EPD_MIGRATION_LOCKED: ['WAITING', 'STOPPED', 'ABORTED'],
  WAITING_MIGRATION: ['RUNNING_MIGRATION', 'STOPPED', 'ABORTED'],
  RUNNING_MIGRATION: ['MIGRATION_LOCKED', 'STOPPED', 'ABORTED'],
  MIGRATION_LOCKED: ['MIGRATION_DONE', 'STOPPED', 'ABORTED'],
  MIGRATION_DONE: ['RUNNING', 'STOPPED', 'ABORTED'],
  STOPPED: ['ENDED'],
  ABORTED: ['ENDED'],
  ENDED: []
}

/** States of the migration loop. */
const MIGRATING: ReadonlySet<SequenceState> = new Set(['RUNNING_EPD_MIGRATION', 'EPD_MIGRATION_LOCKED', 'RUNNING_MIGRATION', 'MIGRATION_LOCKED'])

/** States that only their own loop may leave. */
const BUSY: ReadonlySet<SequenceState> = new Set(['LOCKED', ...MIGRATING])

export const SEQUENCE_STATES = Object.keys(MOVES) as SequenceState[]

function move (sequence: Sequence, from: SequenceState, to: SequenceState): void {
  if (sequence.state !== from || !MOVES[from].includes(to)) {
    throw new Error(`sequence ${sequence.id} is ${sequence.state}: no move ${from} -> ${to}`)
  }
  sequence.state = to
}

/** Leaves a busy state: to `next`, or to where a kept interruption leads. True when it went to `next`. */
function leave (sequence: Sequence, from: SequenceState, next: SequenceState): boolean {
  const { interruption } = sequence
  if (interruption === undefined) {
    move(sequence, from, next)
    return true
  }
  move(sequence, from, interruption.kind === 'stopped' ? 'STOPPED' : 'ABORTED')
  sequence.outcome = interruption
  return false
}

/** Where a new sequence starts. Having both an encoder result and a migration request is refused before this. */
export function initialState (has: { encoderResult: boolean, migrationRequest: boolean }): SequenceState {
  if (has.encoderResult) return 'WAITING_EPD_MIGRATION'
  return has.migrationRequest ? 'WAITING_MIGRATION' : 'WAITING'
}

/** The scheduler gave it blocks for its whole prompt. */
export function admit (sequence: Sequence): void {
  move(sequence, 'WAITING', 'RUNNING')
}

/** The scheduler took its blocks for an older one; it will be computed again, or restored if it arrived by migration. */
export function evict (sequence: Sequence): void {
  move(sequence, 'RUNNING', 'WAITING')
}

/** A forward pass reads and writes its blocks. */
export function lock (sequence: Sequence): void {
  move(sequence, 'RUNNING', 'LOCKED')
}

/** The forward pass is over. False: it was interrupted meanwhile and is STOPPED or ABORTED now. */
export function unlock (sequence: Sequence): boolean {
  return leave(sequence, 'LOCKED', 'RUNNING')
}

/** The migration loop took it up: features are looked for in the cache, and room for the missing ones is waited for. */
export function startEpdMigration (sequence: Sequence): void {
  move(sequence, 'WAITING_EPD_MIGRATION', 'RUNNING_EPD_MIGRATION')
}

/** Its blocks are being written. False: interrupted before that. */
export function lockEpdMigration (sequence: Sequence): boolean {
  return leave(sequence, 'RUNNING_EPD_MIGRATION', 'EPD_MIGRATION_LOCKED')
}

/** All features are here. False: interrupted meanwhile. */
export function finishEpdMigration (sequence: Sequence): boolean {
  return leave(sequence, 'EPD_MIGRATION_LOCKED', 'WAITING')
}

/** The migration loop took it up: KV blocks are reserved, waiting for room. */
export function startMigration (sequence: Sequence): void {
  move(sequence, 'WAITING_MIGRATION', 'RUNNING_MIGRATION')
}

/** Its KV blocks are being written. False: interrupted before that. */
export function lockMigration (sequence: Sequence): boolean {
  return leave(sequence, 'RUNNING_MIGRATION', 'MIGRATION_LOCKED')
}

/** Keys and values of its whole prompt are here. False: interrupted meanwhile. */
export function finishMigration (sequence: Sequence): boolean {
  return leave(sequence, 'MIGRATION_LOCKED', 'MIGRATION_DONE')
}

/** The migration loop gives up in whichever state of either path the sequence is. */
export function failMigration (sequence: Sequence, error: Error): void {
  const { state } = sequence
  if (!MIGRATING.has(state)) throw new Error(`sequence ${sequence.id} is ${state}: no migration to fail`)
  sequence.interruption ??= { kind: 'aborted', error }
  leave(sequence, state, 'ABORTED')
}

/** There is a place for it in the running batch. */
export function joinAfterMigration (sequence: Sequence): void {
  move(sequence, 'MIGRATION_DONE', 'RUNNING')
}

/** Generation is complete. */
export function finish (sequence: Sequence, outcome: Extract<Outcome, { kind: 'stop' | 'length' }>): void {
  move(sequence, 'RUNNING', 'ENDED')
  sequence.outcome = outcome
}

/**
 * Cancel or error from outside. True: it took effect, the sequence is STOPPED or ABORTED and its blocks may be freed.
 * False: it is kept until the sequence leaves its busy state, or came too late.
 */
export function interrupt (sequence: Sequence, interruption: Interruption): boolean {
  const { state } = sequence
  if (state === 'STOPPED' || state === 'ABORTED' || state === 'ENDED') return false
  sequence.interruption ??= interruption
  if (BUSY.has(state)) return false
  leave(sequence, state, state)
  return true
}

/** Everything it held is freed. */
export function end (sequence: Sequence): void {
  if (sequence.state === 'ENDED') return
  move(sequence, sequence.state === 'STOPPED' ? 'STOPPED' : 'ABORTED', 'ENDED')
}
