import { trace, type Attributes } from '@opentelemetry/api'
import type { PoolName } from '../../cache/index.ts'
import { ATTR, ENGINE_TRACER_NAME, SPAN } from '../../../adapters/wire/semconv.ts'
import { failSpan, spanTime } from '../../../adapters/wire/spans.ts'
import type { FetchCall } from './block-link.ts'
import { migrationError } from './migration-error.ts'
import type { Sequence } from '../sequence/sequence.ts'
import { failMigration } from '../sequence/states.ts'

/** The states of a path through the loop; `lock` and `finish` are false when the sequence was interrupted meanwhile. */
export interface MigrationMoves {
  readonly start: (sequence: Sequence) => void
  readonly lock: (sequence: Sequence) => boolean
  readonly finish: (sequence: Sequence) => boolean
}

/**
 * What a sequence brings here from other engines: features (E -> PD) or keys and values (P -> D). A claim ends by one
 * `fetch` or one `drop`. `C` is whatever the path wants to remember between the two.
 */
export interface MigrationPath<C = unknown> {
  /** Which blocks it moves. */
  readonly pool: PoolName
  readonly moves: MigrationMoves
  /** Finds or reserves all that the sequence needs, waiting for room. Rejects with the signal's reason, or CacheError for lack of room. */
  claim (sequence: Sequence, signal: AbortSignal): Promise<C>
  /** Gives up a claim that was not carried out. */
  drop (claim: C): void
  /** Carries out a claim and ACKs the leases; what it says goes on the span. When it has settled nothing is written for the sequence any more. */
  fetch (sequence: Sequence, claim: C, call: FetchCall): Promise<Attributes>
  /** Resolves when the ACKs under way have been answered. */
  settled (): Promise<void>
}

export interface MigrationOptions {
  readonly path: MigrationPath
  /** Sequences that migrate at once. */
  readonly concurrency: number
  /** The sequence has arrived (true), or is STOPPED or ABORTED (false). */
  onSettled (sequence: Sequence, migrated: boolean): void
}

/** The loop beside the main loop: takes sequences along one path to the scheduler, and never holds up decoding. */
export class MigrationLoop {
  readonly #options: MigrationOptions
  readonly #queue: Sequence[] = []
  readonly #active = new Map<Sequence, AbortController>()

  constructor (options: MigrationOptions) {
    this.#options = options
  }

  /** Takes a sequence that waits for migration. */
  add (sequence: Sequence): void {
    this.#queue.push(sequence)
    this.#pump()
  }

  /** The sequence was interrupted: it leaves the queue, or its pulls are told to end. */
  cancel (sequence: Sequence): void {
    const at = this.#queue.indexOf(sequence)
    if (at >= 0) this.#queue.splice(at, 1)
    this.#active.get(sequence)?.abort(sequence.interruption?.error)
  }

  #pump (): void {
    const { path, concurrency, onSettled } = this.#options
    while (this.#active.size < concurrency) {
      const sequence = this.#queue.shift()
      if (sequence === undefined) return
      const controller = new AbortController()
      this.#active.set(sequence, controller)
      path.moves.start(sequence)
      this.#migrate(sequence, controller.signal).then(migrated => {
        this.#active.delete(sequence)
        onSettled(sequence, migrated)
        this.#pump()
      })
    }
  }

  /** Walks one sequence through its states. Never rejects. */
  async #migrate (sequence: Sequence, signal: AbortSignal): Promise<boolean> {
    const { path } = this.#options
    const attributes = { [ATTR.pool]: path.pool, [ATTR.requestId]: sequence.requestId }
    const span = trace.getTracer(ENGINE_TRACER_NAME).startSpan(SPAN.engineMigrate, { startTime: spanTime(), attributes }, sequence.context)
    try {
      const claim = await path.claim(sequence, signal)
      if (!path.moves.lock(sequence)) {
        path.drop(claim)
        return false
      }
      span.setAttributes(await path.fetch(sequence, claim, { signal, context: trace.setSpan(sequence.context, span) }))
      return path.moves.finish(sequence)
    } catch (err) {
      const error = migrationError(err, path.pool)
      failSpan(span, error)
      failMigration(sequence, error)
      return false
    } finally {
      span.end(spanTime())
    }
  }
}

/** What a span tells of a transfer. `peers`: bytes by the engine they came from. */
export function transferAttributes (peers: ReadonlyMap<string, number>, blocks: number, link: string | undefined): Attributes {
  const bytes = [...peers.values()]
  return {
    [ATTR.bytes]: bytes.reduce((sum, n) => sum + n, 0),
    [ATTR.blocks]: blocks,
    [ATTR.peer]: [...peers.keys()].join(','),
    [ATTR.peerBytes]: bytes,
    ...(link === undefined ? {} : { [ATTR.link]: link })
  }
}
