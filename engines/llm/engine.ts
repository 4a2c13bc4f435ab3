import type { FeatureCache } from '../cache/feature-cache.ts'
import type { EngineCounters, EngineLog } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'
import type { BatchScheduler, JoinPlan, Plan } from './scheduler/batch-scheduler.ts'
import { MigrationLoop, type MigrationPath } from './migration/migration-loop.ts'
import type { Runner } from './runner/runner.ts'
import type { DecodeResult } from './runner/program.ts'
import { Sequence, type Outcome, type SequenceInit } from './sequence/sequence.ts'
import { end, finish, initialState, interrupt, lock, unlock } from './sequence/states.ts'
import { SequenceTraces } from './sequence/spans.ts'
import type { SampledToken } from './sequence/sampling.ts'

export interface LlmEngineOptions {
  readonly scheduler: BatchScheduler
  readonly runner: Pick<Runner, 'prefill' | 'decode' | 'reset'>
  readonly features: FeatureCache
  /** What sequences bring from other engines: an engine takes features, or keys and values. */
  readonly path: MigrationPath
  readonly counters: EngineCounters
  readonly log: EngineLog
  /** Sequences that migrate at once. */
  readonly migrations: number
  /** Positions the model has. */
  readonly maxPositions: number
}

/** Glue: sequences come in, the migration loop and the main loop bring them to their end. */
export class LlmEngine {
  readonly #options: LlmEngineOptions
  readonly #migration: MigrationLoop
  readonly #traces: SequenceTraces
  readonly #live = new Set<Sequence>()
  #lastId = 0
  #wake: (() => void) | undefined
  #closed = false
  readonly #loop: Promise<void>
  #onIdle: Array<() => void> = []
  /** Forward passes since the start. */
  readonly steps = { prefill: 0, decode: 0, decodedTokens: 0, prefilledTokens: 0 }

  constructor (options: LlmEngineOptions) {
    this.#options = options
    this.#traces = new SequenceTraces(options.counters)
    this.#migration = new MigrationLoop({
      path: options.path,
      concurrency: options.migrations,
      onSettled: (sequence, migrated) => migrated ? this.#enqueue(sequence) : this.#retire(sequence)
    })
    this.#loop = this.#run()
  }

  /** Sequences that have not ENDED. */
  get live (): ReadonlySet<Sequence> {
    return this.#live
  }

  nextId (): number {
    return ++this.#lastId
  }

  /** Longest prompt plus output that can be run here. */
  get maxLength (): number {
    return Math.min(this.#options.maxPositions, this.#options.scheduler.maxTokens)
  }

  /** Times a sequence lost its blocks to an older one. */
  get evictions (): number {
    return this.#options.scheduler.evictions
  }

  /**
   * Starts a sequence in the state that what it brings asks for. It takes over the references to features it comes with.
   * Prompt and output must fit in `maxLength`.
   */
  submit (init: SequenceInit): Sequence {
    const has = { encoderResult: init.media.some(item => item.source !== undefined), migrationRequest: init.migration !== undefined }
    const sequence = new Sequence(init, initialState(has))
    this.#live.add(sequence)
    if (this.#closed) this.interrupt(sequence, { kind: 'aborted', error: new EngineError('draining', 'the engine is closing') })
    else if (sequence.state === 'WAITING') this.#enqueue(sequence)
    else this.#migration.add(sequence)
    return sequence
  }

  /** Cancels a sequence or lets it fail; at once, or when it leaves the state in which it is read or written. */
  interrupt (sequence: Sequence, interruption: Extract<Outcome, { kind: 'stopped' | 'aborted' }>): void {
    const done = interrupt(sequence, interruption)
    this.#migration.cancel(sequence)
    if (done) this.#retire(sequence)
  }

  #enqueue (sequence: Sequence): void {
    this.#options.scheduler.add(sequence)
    this.wake()
  }

  /** Blocks were given back from outside: those who wait for room may have it now. */
  wake (): void {
    this.#wake?.()
  }

  async #run (): Promise<void> {
    while (!this.#closed) {
      const plan = this.#options.scheduler.schedule()
      if (plan === undefined) await new Promise<void>(resolve => { this.#wake = resolve })
      else await this.#step(plan)
    }
  }

  async #step (plan: Plan): Promise<void> {
    if (plan.kind === 'join') {
      for (const sequence of plan.sequences) this.#accept(sequence, sequence.first as SampledToken)
      return
    }
    const sequences = plan.kind === 'prefill' ? plan.chunks.map(chunk => chunk.sequence) : plan.sequences
    for (const sequence of sequences) {
      this.#traces.running(sequence)
      lock(sequence)
    }
    let results: DecodeResult[]
    try {
      results = await this.#forward(plan)
    } catch (err) {
      this.#options.log.error({ err }, 'forward pass failed')
      this.#options.runner.reset()
      const error = new EngineError('internal', 'The engine failed to compute the request.', { cause: err })
      for (const sequence of sequences) sequence.interruption ??= { kind: 'aborted', error }
      results = []
    }
    if (plan.kind === 'prefill') for (const chunk of plan.chunks) this.#afterPrefill(chunk)
    else plan.sequences.forEach((sequence, i) => this.#afterDecode(sequence, results[i]))
  }

  async #forward (plan: Exclude<Plan, JoinPlan>): Promise<DecodeResult[]> {
    const { runner } = this.#options
    if (plan.kind === 'decode') {
      this.steps.decode++
      this.steps.decodedTokens += plan.sequences.length
      return (await runner.decode(plan.sequences)).value
    }
    this.steps.prefill++
    this.steps.prefilledTokens += plan.chunks.reduce((sum, chunk) => sum + chunk.count, 0)
    await runner.prefill(plan.chunks)
    return []
  }

  #afterPrefill (chunk: Extract<Plan, { kind: 'prefill' }>['chunks'][number]): void {
    if (unlock(chunk.sequence)) this.#options.scheduler.prefilled(chunk)
    else this.#retire(chunk.sequence)
  }

  #afterDecode (sequence: Sequence, result: DecodeResult | undefined): void {
    if (result !== undefined && 'error' in result) {
      sequence.interruption ??= { kind: 'aborted', error: new EngineError('internal', `the model gave no usable result: ${result.error}`) }
    }
    if (!unlock(sequence)) return this.#retire(sequence)
    const sampled = result as Exclude<DecodeResult, { error: string }>
    this.#options.scheduler.decoded(sequence, sampled.token)
    this.#accept(sequence, sampled)
  }

  /** One more token, sampled here or (the first of a migrated sequence) by P: told, counted, and perhaps the last. */
  #accept (sequence: Sequence, sampled: SampledToken): void {
    sequence.first ??= sampled
    this.#traces.sampled(sequence)
    const outcome = stopOutcome(sequence, sampled, this.maxLength)
    if (outcome === undefined) return
    finish(sequence, outcome)
    this.#retire(sequence)
  }

  /** The one exit: frees what the sequence held, then tells whoever waits for it. */
  #retire (sequence: Sequence): void {
    if (!this.#live.delete(sequence)) return
    const { scheduler, features } = this.#options
    scheduler.remove(sequence)
    for (const item of sequence.media) {
      if (item.features !== undefined) features.unref(item.features)
      item.features = undefined
    }
    end(sequence)
    const outcome = sequence.outcome as Outcome
    this.#traces.ended(sequence, outcome)
    sequence.sink.onEnd(sequence, outcome)
    if (this.#live.size === 0) for (const resolve of this.#onIdle.splice(0)) resolve()
    this.wake()
  }

  /** Resolves when no sequence is live. */
  async idle (): Promise<void> {
    if (this.#live.size > 0) await new Promise<void>(resolve => this.#onIdle.push(resolve))
    await this.#options.path.settled()
  }

  /** Takes no more, fails what is live, and resolves when the last forward pass has ended. */
  async close (): Promise<void> {
    this.#closed = true
    const error = new EngineError('draining', 'the engine is closing')
    for (const sequence of [...this.#live]) this.interrupt(sequence, { kind: 'aborted', error })
    this.wake()
    await this.#loop
    await this.idle()
  }

  /** Throws unless every block and reference is accounted for. For tests and for an idle engine. */
  checkIntegrity (): void {
    this.#options.scheduler.checkIntegrity()
    if (this.#live.size > 0) return
    if (this.#options.scheduler.size > 0) throw new Error(`idle, but ${this.#options.scheduler.size} sequences are scheduled`)
    if (this.#options.features.stats.referenced > 0) throw new Error('idle, but feature blocks are held')
  }
}

/** Whether the token just sampled ends the sequence. A token that ends it by id is not shown to the sink: it is no text. */
function stopOutcome (sequence: Sequence, sampled: SampledToken, maxLength: number): Extract<Outcome, { kind: 'stop' | 'length' }> | undefined {
  const { ignoreEos, eosIds, stopIds } = sequence.sampling
  if (!ignoreEos && eosIds.includes(sampled.token)) return { kind: 'stop', reason: 'eos' }
  if (stopIds.includes(sampled.token)) return { kind: 'stop', reason: 'stop_id' }
  if (sequence.sink.onToken(sequence, sampled)) return { kind: 'stop', reason: 'stop_string' }
  if (sequence.generated >= sequence.maxTokens || sequence.length >= maxLength) return { kind: 'length' }
  return undefined
}
