import type { Context, Span } from '@opentelemetry/api'
import type { FeatureCache, FeatureEntry } from '../cache/index.ts'
import type { EngineCounters, EngineLog } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'
import { FEATURE_BLOCK_TOKENS, type LoadedModel, type PreparedItem } from '../models/index.ts'
import { ProgramHost, type Device } from '../runtime/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import { Batcher } from './batcher.ts'
import { inSpan } from './media-error.ts'
import type { VisionMethods } from './vision-program.ts'

/** Units (tiles) in one run, as a multiple of the items: most pictures are a few tiles. */
const UNITS_PER_ITEM = 4
const MAX_WINDOW_MS = 5

export interface EncodeStageOptions {
  readonly model: LoadedModel
  readonly device: Device
  readonly threads: number
  readonly cache: FeatureCache
  readonly counters: EngineCounters
  /** Items in one run. */
  readonly maxItems: number
  /** How many items are about to come. */
  readonly expected: () => number
  readonly log?: EngineLog | undefined
}

export interface VisionStats {
  readonly runs: number
  readonly items: number
  readonly units: number
  /** Items of a run -> how often. */
  readonly batchSizes: ReadonlyMap<number, number>
  /** Of the session worker, microseconds. */
  readonly busyUs: number
  readonly ortUs: number
}

interface Job {
  readonly prepared: PreparedItem
  readonly entry: FeatureEntry
  readonly units: number
  readonly key: string
  readonly alone: boolean | undefined
  readonly span: Span
  readonly queuedAt: number
  resolve (): void
  reject (reason: unknown): void
}

/** Inputs join when they agree in name, type and every dimension but the batch axis. */
function joinKey (prepared: PreparedItem): string {
  return prepared.inputs.map(({ name, batchAxis, tensor }) => `${name}:${tensor.type}:${tensor.dims.map((d, axis) => axis === batchAxis ? '*' : d).join('x')}`).join(';')
}

/** Vision inputs to features in blocks: batches, one at a time, in the session worker. */
export class EncodeStage {
  readonly #host: ProgramHost<VisionMethods>
  readonly #batcher: Batcher<Job>
  readonly #options: EncodeStageOptions
  #running = 0
  #totals = { runs: 0, items: 0, units: 0 }
  readonly #batchSizes = new Map<number, number>()

  private constructor (host: ProgramHost<VisionMethods>, options: EncodeStageOptions) {
    const { maxItems, expected } = options
    this.#host = host
    this.#options = options
    this.#batcher = new Batcher({ maxItems, maxUnits: maxItems * UNITS_PER_ITEM, maxWindowMs: MAX_WINDOW_MS }, expected, batch => this.#run(batch))
  }

  /** @throws when the graph, onnxruntime-node or the device can't be used. */
  static async open (options: EncodeStageOptions): Promise<EncodeStage> {
    const { model, device, threads, cache, log } = options
    if (model.files.vision === undefined) throw new Error('the model was loaded without its vision encoder')
    const host = await ProgramHost.open<VisionMethods>({
      program: new URL('./vision-program.js', import.meta.url),
      device,
      threads,
      data: { path: model.files.vision, hiddenSize: model.hiddenSize, blockTokens: FEATURE_BLOCK_TOKENS },
      pools: { feature: cache.pool.sab },
      name: 'vision',
      log
    })
    return new EncodeStage(host, options)
  }

  get problem (): string | undefined {
    return this.#host.problem
  }

  get stats (): VisionStats {
    const { busyUs, ortUs } = this.#host.totals
    return { ...this.#totals, batchSizes: this.#batchSizes, busyUs, ortUs }
  }

  /** Items in the run that is on. */
  get running (): number {
    return this.#running
  }

  /**
   * Waits for a place in a batch and for the run, which fills the entry's blocks. Leaves the queue at once on abort; a
   * run it is in is awaited, so that nothing is freed while it is written.
   */
  encode (prepared: PreparedItem, entry: FeatureEntry, context: Context, signal: AbortSignal): Promise<void> {
    const attributes = { [ATTR.requestModel]: this.#options.model.name, [ATTR.tokens]: prepared.numTokens, [ATTR.blocks]: entry.blocks.length }
    return inSpan(SPAN.engineEncode, context, attributes, span => this.#enqueue(prepared, entry, span, signal))
  }

  async #enqueue (prepared: PreparedItem, entry: FeatureEntry, span: Span, signal: AbortSignal): Promise<void> {
    // While it waited for room the last of those who wanted it may have gone.
    signal.throwIfAborted()
    let onAbort = (): void => {}
    try {
      await new Promise<void>((resolve, reject) => {
        const job: Job = { prepared, entry, units: prepared.units, key: joinKey(prepared), alone: prepared.alone, span, queuedAt: performance.now(), resolve, reject }
        onAbort = () => { if (this.#batcher.drop(job)) reject(signal.reason) }
        signal.addEventListener('abort', onAbort, { once: true })
        this.#batcher.add(job)
      })
    } finally {
      signal.removeEventListener('abort', onAbort)
    }
  }

  async #run (batch: readonly Job[]): Promise<void> {
    const start = performance.now()
    this.#running = batch.length
    const jobs = batch.map(({ prepared, entry }) => ({ inputs: prepared.inputs, numTokens: prepared.numTokens, blocks: entry.blocks }))
    const transfer = batch.flatMap(({ prepared }) => prepared.inputs.map(({ tensor }) => tensor.data.buffer as ArrayBuffer))
    for (const job of batch) job.span.setAttributes({ [ATTR.batch]: batch.length, [ATTR.queueMs]: start - job.queuedAt })
    try {
      const { value: finite } = await this.#host.call('encode', jobs, { transfer })
      this.#count(batch)
      batch.forEach((job, i) => {
        if (finite[i] === true) job.resolve()
        else job.reject(new EngineError('internal', 'The vision encoder gave features that are not finite for this picture.'))
      })
    } catch (err) {
      for (const job of batch) job.reject(err)
    } finally {
      this.#running = 0
    }
  }

  #count (batch: readonly Job[]): void {
    const { runs, items, units } = this.#totals
    this.#totals = { runs: runs + 1, items: items + batch.length, units: batch.reduce((n, job) => n + job.units, units) }
    this.#batchSizes.set(batch.length, (this.#batchSizes.get(batch.length) ?? 0) + 1)
    this.#options.counters.encodedItems += batch.length
  }

  close (): Promise<void> {
    return this.#host.close()
  }
}
