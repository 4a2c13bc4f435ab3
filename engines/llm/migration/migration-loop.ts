import { trace, type Attributes } from '@opentelemetry/api'
import { ATTR, ENGINE_TRACER_NAME, SPAN } from '../../../adapters/wire/semconv.ts'
import { failSpan, spanTime } from '../../../adapters/wire/spans.ts'
import type { PoolName } from '../../cache/index.ts'
import type { Sequence } from '../sequence/sequence.ts'
import { failMigration } from '../sequence/states.ts'
import type { FetchCall } from './block-link.ts'
import { migrationError } from './migration-error.ts'

/** The moves of a path through its states; `lock` and `finish` return false when the sequence was interrupted meanwhile. */
export interface MigrationMoves {
  readonly start: (sequence: Sequence) => void
  readonly lock: (sequence: Sequence) => boolean
  readonly finish: (sequence: Sequence) => boolean
}

/**
 * How sequences get what another engine computed: features (E -> PD) or keys and values (P -> D). A reservation of type
 * `R` ends by one `fetch` or one `cancel`.
 */
export interface MigrationPath<R = unknown> {
  /** Which blocks it moves. */
  readonly pool: PoolName
  readonly moves: MigrationMoves
  /** Local blocks for all that the sequence needs, waiting for room. Rejects with the signal's reason, or CacheError for lack of room. */
  reserve (sequence: Sequence, signal: AbortSignal): Promise<R>
  /** Gives up a reservation. */
  cancel (reservation: R): void
  /** Pulls into the reserved blocks and ACKs the leases. Returns span attributes. Once it has settled, nothing writes to the blocks any more. */
  fetch (sequence: Sequence, reservation: R, call: FetchCall): Promise<Attributes>
  /** Resolves when the ACKs under way have been answered. */
  settled (): Promise<void>
}

export interface MigrationOptions {
  readonly path: MigrationPath
  /** The migration succeeded (true), or the sequence is STOPPED or ABORTED (false). */
  onSettled (sequence: Sequence, migrated: boolean): void
}

/**
 * Beside the main loop: brings sequences along one path to the scheduler. Decoding never waits for it. A sequence that waits
 * for room holds up none that has it.
 */
export class MigrationLoop {
  readonly #options: MigrationOptions
  readonly #active = new Map<Sequence, AbortController>()

  constructor (options: MigrationOptions) {
    this.#options = options
  }

  /** Takes a sequence that waits for migration. */
  add (sequence: Sequence): void {
    const { path, onSettled } = this.#options
    const controller = new AbortController()
    this.#active.set(sequence, controller)
    path.moves.start(sequence)
    this.#migrate(sequence, controller.signal).then(migrated => {
      this.#active.delete(sequence)
      onSettled(sequence, migrated)
    })
  }

  /** The sequence was interrupted: it waits no longer, and its pulls are aborted. */
  cancel (sequence: Sequence): void {
    this.#active.get(sequence)?.abort(sequence.interruption?.error)
  }

  /** Moves one sequence through its states: reserve, lock, fetch, finish. Never rejects. */
  async #migrate (sequence: Sequence, signal: AbortSignal): Promise<boolean> {
    const { path } = this.#options
    const attributes = { [ATTR.pool]: path.pool, [ATTR.requestId]: sequence.requestId }
    const span = trace.getTracer(ENGINE_TRACER_NAME).startSpan(SPAN.engineMigrate, { startTime: spanTime(), attributes }, sequence.context)
    try {
      const reservation = await path.reserve(sequence, signal)
      if (!path.moves.lock(sequence)) {
        path.cancel(reservation)
        return false
      }
      span.setAttributes(await path.fetch(sequence, reservation, { signal, context: trace.setSpan(sequence.context, span) }))
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

/** Span attributes of a transfer. `peers`: bytes by the engine they came from. */
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
