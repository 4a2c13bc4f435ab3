import type { FeatureCache } from '../cache/feature-cache.ts'
import type { EngineCounters, EngineLog } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'
import { MigrationLoop, type MigrationPath } from './migration/migration-loop.ts'
import type { DecodeResult } from './runner/program.ts'
import type { Runner } from './runner/runner.ts'
import type { Batch, BatchScheduler } from './scheduler/batch-scheduler.ts'
import type { SampledToken } from './sequence/sampling.ts'
import { Sequence, type Outcome, type SequenceInit } from './sequence/sequence.ts'
import { SequenceSpans } from './sequence/spans.ts'
import { end, finish, initialState, interrupt, lock, unlock } from './sequence/states.ts'

type Interruption = Extract<Outcome, { kind: 'stopped' | 'aborted' }>

export interface LlmEngineOptions {
  readonly scheduler: BatchScheduler
  readonly runner: Pick<Runner, 'prefill' | 'decode' | 'reset'>
  readonly features: FeatureCache
  /** What sequences get from other engines: an engine takes features, or keys and values. */
  readonly path: MigrationPath
  readonly counters: EngineCounters
  readonly log: EngineLog
  /** Positions the model has. */
  readonly maxPositions: number
}

/**
 * Runs sequences: `submit` takes them in, the migration loop brings what other engines computed for them, the main loop
 * computes step after step, and `#retire` lets them out.
 */
export class LlmEngine {
  readonly #options: LlmEngineOptions
  readonly #migration: MigrationLoop
  readonly #spans: SequenceSpans
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
    this.#spans = new SequenceSpans(options.counters)
    this.#migration = new MigrationLoop({
      path: options.path,
      onSettled: (sequence, migrated) => migrated ? this.#enqueue(sequence) : this.#retire(sequence)
    })
    this.#loop = this.#run()
  }

  async #run (): Promise<void> {
    while (!this.#closed) {
      try {
        await this.#step()
      } catch (err) {
        this.#recover(err)
      }
    }
  }

  /**
   * A step failed in bookkeeping, which only a bug explains: what was in it ends, and the loop goes on with what the check
   * finds in order. When it finds more than that the error goes up and ends the process: a wrong table must not serve.
   */
  #recover (err: unknown): void {
    const { scheduler, runner, log } = this.#options
    if (this.#live.size === 0) throw err
    log.error({ err }, 'a step of the engine failed; the sequences in it end')
    runner.reset()
    for (const sequence of [...this.#live]) {
      fail(sequence, 'The engine failed to compute the request.', err)
      if (sequence.state === 'LOCKED') unlock(sequence)
      else this.interrupt(sequence, sequence.interruption as Interruption)
      if (sequence.state === 'ABORTED' || sequence.state === 'STOPPED') this.#retire(sequence)
    }
    scheduler.checkIntegrity()
  }

  /**
   * One step: schedule, run, post-process. Evictions happen while scheduling; migrations run beside the steps; a cancel
   * that arrives during `#runBatch` takes effect in `#postprocess`, when the sequence is unlocked.
   */
  async #step (): Promise<void> {
    const batch = this.#options.scheduler.schedule()
    if (batch === undefined) return await this.#woken()
    const results = await this.#runBatch(batch)
    this.#postprocess(batch, results)
  }

  /** One result a sequence for decode and join, none for prefill or when the forward pass failed. */
  async #runBatch (batch: Batch): Promise<readonly DecodeResult[]> {
    // Migrated sequences enter the batch with the token that the prefill engine sampled.
    if (batch.kind === 'join') return batch.sequences.map(sequence => sequence.first as SampledToken)
    const sequences = batch.kind === 'prefill' ? batch.chunks.map(chunk => chunk.sequence) : batch.sequences
    for (const sequence of sequences) {
      this.#spans.running(sequence)
      lock(sequence)
    }
    const { runner, log } = this.#options
    this.#count(batch)
    try {
      if (batch.kind === 'decode') return (await runner.decode(batch.sequences)).value
      await runner.prefill(batch.chunks)
    } catch (err) {
      log.error({ err }, 'forward pass failed')
      runner.reset()
      for (const sequence of sequences) fail(sequence, 'The engine failed to compute the request.', err)
    }
    return []
  }

  #count (batch: Exclude<Batch, { kind: 'join' }>): void {
    this.steps[batch.kind]++
    if (batch.kind === 'decode') this.steps.decodedTokens += batch.sequences.length
    else this.steps.prefilledTokens += batch.chunks.reduce((sum, chunk) => sum + chunk.count, 0)
  }

  #postprocess (batch: Batch, results: readonly DecodeResult[]): void {
    const { scheduler } = this.#options
    if (batch.kind === 'prefill') {
      for (const chunk of batch.chunks) {
        const { sequence } = chunk
        if (unlock(sequence)) {
          scheduler.prefilled(chunk)
          if (sequence.maxTokens > 0 || sequence.prefillLeft > 0) continue
          finish(sequence, { kind: 'length' })
        }
        this.#retire(sequence)
      }
      return
    }
    for (const [i, sequence] of batch.sequences.entries()) {
      const result = results[i]
      if (batch.kind === 'decode') {
        if (result !== undefined && 'error' in result) {
          sequence.broken = true
          fail(sequence, `the model gave no usable result: ${result.error}`)
        }
        if (!unlock(sequence)) {
          this.#retire(sequence)
          continue
        }
        scheduler.decoded(sequence, (result as SampledToken).token)
      }
      try {
        this.#accept(sequence, result as SampledToken)
      } catch (err) {
        this.#options.log.error({ err }, 'a token could not be taken')
        this.interrupt(sequence, { kind: 'aborted', error: new EngineError('internal', 'The engine failed to compute the request.', { cause: err }) })
      }
    }
  }

  /** One more token: counted, passed on, and perhaps the last. */
  #accept (sequence: Sequence, sampled: SampledToken): void {
    sequence.first ??= sampled
    this.#spans.sampled(sequence)
    const outcome = stopOutcome(sequence, sampled, this.maxLength)
    if (outcome === undefined) return
    finish(sequence, outcome)
    this.#retire(sequence)
  }

  /** The one exit: frees what the sequence held, then ends its request's part. */
  #retire (sequence: Sequence): void {
    if (!this.#live.delete(sequence)) return
    const { scheduler, features } = this.#options
    scheduler.remove(sequence)
    for (const item of sequence.media) {
      if (item.features === undefined) continue
      if (sequence.broken) features.forget(item.features)
      features.unref(item.features)
      item.features = undefined
    }
    sequence.constraint?.close()
    end(sequence)
    const outcome = sequence.outcome as Outcome
    this.#spans.ended(sequence, outcome)
    sequence.sink.onEnd(sequence, outcome)
    if (this.#live.size === 0) for (const resolve of this.#onIdle.splice(0)) resolve()
    this.wake()
  }

  /** Sequences that have not ENDED. */
  get live (): ReadonlySet<Sequence> {
    return this.#live
  }

  nextId (): number {
    return ++this.#lastId
  }

  /** Longest prompt plus output that can run here. */
  get maxLength (): number {
    return Math.min(this.#options.maxPositions, this.#options.scheduler.maxTokens)
  }

  /** Times a sequence lost its blocks to an older one. */
  get evictions (): number {
    return this.#options.scheduler.evictions
  }

  /**
   * Takes over a sequence and the references to features that it comes with. It starts in migration when its features, or
   * its keys and values, are in another engine. Prompt and output must fit in `maxLength`.
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

  /** Cancels a sequence or makes it fail: at once, or after the forward pass or transfer that is using its blocks. */
  interrupt (sequence: Sequence, interruption: Interruption): void {
    const done = interrupt(sequence, interruption)
    this.#migration.cancel(sequence)
    if (done) this.#retire(sequence)
  }

  #enqueue (sequence: Sequence): void {
    this.#options.scheduler.add(sequence)
    this.wake()
  }

  /** There may be work: a sequence was added, or blocks were freed. */
  wake (): void {
    this.#wake?.()
  }

  async #woken (): Promise<void> {
    await new Promise<void>(resolve => { this.#wake = resolve })
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

/** A locked sequence failed; the first reason counts. It takes effect when the sequence is unlocked. */
function fail (sequence: Sequence, message: string, cause?: unknown): void {
  sequence.interruption ??= { kind: 'aborted', error: new EngineError('internal', message, { cause }) }
}

/** Whether the token just sampled ends the sequence. A token that ends it by id is no text, so the sink does not get it. */
function stopOutcome (sequence: Sequence, sampled: SampledToken, maxLength: number): Extract<Outcome, { kind: 'stop' | 'length' }> | undefined {
  const { ignoreEos, eosIds, stopIds } = sequence.sampling
  if (!ignoreEos && eosIds.includes(sampled.token)) return { kind: 'stop', reason: 'eos' }
  if (stopIds.includes(sampled.token)) return { kind: 'stop', reason: 'stop_id' }
  if (sequence.sink.onToken(sequence, sampled)) return { kind: 'stop', reason: 'stop_string' }
  if (sequence.constraint !== undefined) {
    sequence.constraint.accept(sampled.token)
    if (sequence.constraint.complete) return { kind: 'stop', reason: 'complete' }
  }
  if (sequence.generated >= sequence.maxTokens || sequence.length >= maxLength) return { kind: 'length' }
  return undefined
}
