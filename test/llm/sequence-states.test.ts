import t from 'tap'
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { GREEDY } from '../../engines/llm/sequence/sampling.ts'
import { Sequence, type SequenceState } from '../../engines/llm/sequence/sequence.ts'
import * as moves from '../../engines/llm/sequence/states.ts'

function sequence (state: SequenceState): Sequence {
  return new Sequence({
    id: 1,
    requestId: 'r',
    tokens: [1, 2, 3],
    positions: { axes: 1, values: Int32Array.of(0, 1, 2), next: 3 },
    spans: [],
    media: [],
    cacheSalt: '',
    sampling: GREEDY,
    maxTokens: 4,
    context: ROOT_CONTEXT,
    sink: { onToken: () => false, onEnd: () => {} }
  }, state)
}

const cancelled = { kind: 'stopped', error: new Error('cancelled') } as const
const failed = { kind: 'aborted', error: new Error('failed') } as const
const BUSY: readonly SequenceState[] = ['LOCKED', 'RUNNING_EPD_MIGRATION', 'EPD_MIGRATION_LOCKED', 'RUNNING_MIGRATION', 'MIGRATION_LOCKED']
const FINAL: readonly SequenceState[] = ['STOPPED', 'ABORTED', 'ENDED']

t.test('a sequence starts where what it brings says', async t => {
  t.equal(moves.initialState({ encoderResult: false, migrationRequest: false }), 'WAITING')
  t.equal(moves.initialState({ encoderResult: true, migrationRequest: false }), 'WAITING_EPD_MIGRATION')
  t.equal(moves.initialState({ encoderResult: false, migrationRequest: true }), 'WAITING_MIGRATION')
})

t.test('the standard path runs, is evicted, runs again and ends', async t => {
  const s = sequence('WAITING')
  moves.admit(s)
  moves.lock(s)
  t.equal(s.state, 'LOCKED')
  t.ok(moves.unlock(s))
  moves.evict(s)
  t.equal(s.state, 'WAITING')
  moves.admit(s)
  moves.finish(s, { kind: 'length' })
  t.equal(s.state, 'ENDED')
  t.same(s.outcome, { kind: 'length' })
  moves.end(s)
  t.equal(s.state, 'ENDED', 'ending twice does nothing')
})

t.test('the E -> PD path leads to WAITING', async t => {
  const s = sequence('WAITING_EPD_MIGRATION')
  moves.startEpdMigration(s)
  t.ok(moves.lockEpdMigration(s))
  t.equal(s.state, 'EPD_MIGRATION_LOCKED')
  t.ok(moves.finishEpdMigration(s))
  t.equal(s.state, 'WAITING')
})

t.test('the P -> D path leads to RUNNING', async t => {
  const s = sequence('WAITING_MIGRATION')
  moves.startMigration(s)
  t.ok(moves.lockMigration(s))
  t.ok(moves.finishMigration(s))
  moves.joinAfterMigration(s)
  t.equal(s.state, 'RUNNING')
})

t.test('an interruption takes effect at once, or on leaving a busy state', async t => {
  for (const state of moves.SEQUENCE_STATES) {
    for (const interruption of [cancelled, failed]) {
      const s = sequence(state)
      const now = moves.interrupt(s, interruption)
      const target = interruption.kind === 'stopped' ? 'STOPPED' : 'ABORTED'
      if (FINAL.includes(state)) {
        t.notOk(now, `${state}: too late`)
        t.equal(s.state, state)
      } else if (BUSY.includes(state)) {
        t.notOk(now, `${state}: kept`)
        t.equal(s.state, state)
        t.equal(s.interruption, interruption)
      } else {
        t.ok(now, `${state}: at once`)
        t.equal(s.state, target)
        t.equal(s.outcome, interruption)
        moves.end(s)
        t.equal(s.state, 'ENDED')
      }
    }
  }
})

t.test('leaving a busy state with an interruption leads to the end, and the first interruption counts', async t => {
  const leaving: Array<[SequenceState, (s: Sequence) => boolean]> = [
    ['LOCKED', moves.unlock], ['RUNNING_EPD_MIGRATION', moves.lockEpdMigration], ['EPD_MIGRATION_LOCKED', moves.finishEpdMigration],
    ['RUNNING_MIGRATION', moves.lockMigration], ['MIGRATION_LOCKED', moves.finishMigration]
  ]
  for (const [state, leave] of leaving) {
    const s = sequence(state)
    moves.interrupt(s, cancelled)
    moves.interrupt(s, failed)
    t.notOk(leave(s), state)
    t.equal(s.state, 'STOPPED')
  }
})

t.test('a failed migration aborts from every state of either path, unless it was cancelled before', async t => {
  for (const state of ['RUNNING_EPD_MIGRATION', 'EPD_MIGRATION_LOCKED', 'RUNNING_MIGRATION', 'MIGRATION_LOCKED'] as const) {
    const s = sequence(state)
    moves.failMigration(s, failed.error)
    t.equal(s.state, 'ABORTED')
    const c = sequence(state)
    moves.interrupt(c, cancelled)
    moves.failMigration(c, failed.error)
    t.equal(c.state, 'STOPPED')
  }
})

t.test('every other move is refused', async t => {
  const functions: Array<[string, SequenceState, (s: Sequence) => unknown]> = [
    ['admit', 'WAITING', moves.admit], ['evict', 'RUNNING', moves.evict], ['lock', 'RUNNING', moves.lock], ['unlock', 'LOCKED', moves.unlock],
    ['startEpdMigration', 'WAITING_EPD_MIGRATION', moves.startEpdMigration], ['lockEpdMigration', 'RUNNING_EPD_MIGRATION', moves.lockEpdMigration],
    ['finishEpdMigration', 'EPD_MIGRATION_LOCKED', moves.finishEpdMigration], ['startMigration', 'WAITING_MIGRATION', moves.startMigration],
    ['lockMigration', 'RUNNING_MIGRATION', moves.lockMigration], ['finishMigration', 'MIGRATION_LOCKED', moves.finishMigration],
    ['joinAfterMigration', 'MIGRATION_DONE', moves.joinAfterMigration], ['finish', 'RUNNING', s => moves.finish(s, { kind: 'length' })]
  ]
  for (const [name, from, make] of functions) {
    for (const state of moves.SEQUENCE_STATES) {
      const s = sequence(state)
      if (state === from) t.doesNotThrow(() => make(s), `${name} from ${state}`)
      else t.throws(() => make(s), `${name} from ${state}`)
    }
  }
  for (const state of ['WAITING', 'WAITING_MIGRATION', 'MIGRATION_DONE', 'LOCKED', 'ENDED'] as const) t.throws(() => moves.failMigration(sequence(state), failed.error), `no migration to fail in ${state}`)
  t.throws(() => moves.end(sequence('RUNNING')), 'a running sequence does not just end')
})
