/**
 * Numbers by labels, for GET /metrics of gateway and engines. Something that happens costs a few additions; texts are
 * made when a page is read.
 */

/** In the order of the names; what is undefined has no label. */
export type LabelValues = ReadonlyArray<string | undefined>
/** By the names of OpenTelemetry, with dots. */
export type Labels = Readonly<Record<string, string>>

export interface Sample { readonly labels: Labels, readonly value: number }

/** A request that a bucket has counted: its trace can be looked up. */
export interface Exemplar {
  readonly traceId: string
  readonly value: number
  /** Unix time in seconds. */
  readonly at: number
}

export interface Distribution {
  readonly labels: Labels
  readonly bounds: readonly number[]
  /** How many values are in each bucket alone. The last one has those above all bounds. */
  readonly buckets: readonly number[]
  readonly sum: number
  /** The last of each bucket. */
  readonly exemplars: ReadonlyArray<Exemplar | undefined>
}

/** Nodes come and go: the oldest series makes room. */
const MAX_SERIES = 2_000

class SeriesTable<T> extends Map<string, T> {
  readonly #names: readonly string[]
  readonly #make: (labels: Labels) => T
  /** Most often the next one has the same values: comparing them takes a tenth of the time that a key does. */
  #last: { readonly values: LabelValues, readonly series: T } | undefined

  constructor (names: readonly string[], make: (labels: Labels) => T) {
    super()
    this.#names = names
    this.#make = make
  }

  at (values: LabelValues): T {
    if (this.#last?.values.every((value, i) => value === values[i]) === true) return this.#last.series
    const key = values.join('\n')
    let series = this.get(key)
    if (series === undefined) {
      if (this.size >= MAX_SERIES) this.delete(this.keys().next().value!)
      series = this.#make(Object.fromEntries(this.#names.flatMap((name, i) => values[i] === undefined ? [] : [[name, values[i]]])))
      this.set(key, series)
    }
    this.#last = { values, series }
    return series
  }
}

export class Counter {
  readonly #series: SeriesTable<{ readonly labels: Labels, value: number }>

  constructor (...names: string[]) {
    this.#series = new SeriesTable(names, labels => ({ labels, value: 0 }))
  }

  add (amount: number, ...values: LabelValues): void {
    this.#series.at(values).value += amount
  }

  samples (): Sample[] {
    return [...this.#series.values()]
  }

  get total (): number {
    return this.samples().reduce((sum, { value }) => sum + value, 0)
  }
}

export class Histogram {
  /** Get each value too: instruments of the application's SDK. */
  readonly listeners: Array<(value: number, labels: Labels) => void> = []
  readonly bounds: readonly number[]
  readonly #series: SeriesTable<Distribution & { readonly buckets: number[], sum: number, readonly exemplars: Array<Exemplar | undefined> }>

  constructor (bounds: readonly number[], ...names: string[]) {
    this.bounds = bounds
    this.#series = new SeriesTable(names, labels => ({ labels, bounds, buckets: new Array<number>(bounds.length + 1).fill(0), sum: 0, exemplars: [] }))
  }

  /** @param traceId of a request whose trace is recorded */
  record (value: number, values: LabelValues, traceId?: string): void {
    const series = this.#series.at(values)
    let bucket = 0
    while (bucket < this.bounds.length && value > this.bounds[bucket]!) bucket++
    series.buckets[bucket]!++
    series.sum += value
    if (traceId !== undefined) series.exemplars[bucket] = { traceId, value, at: Date.now() / 1_000 }
    for (const listener of this.listeners) listener(value, series.labels)
  }

  distributions (): Distribution[] {
    return [...this.#series.values()]
  }
}
