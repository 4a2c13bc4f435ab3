import { ValueType, type Attributes, type Histogram, type Meter, type MetricOptions } from '@opentelemetry/api'
import type { Resource } from '@opentelemetry/resources'
import { AggregationTemporality, DataPointType, type CollectionResult, type HistogramMetricData, type MetricProducer } from '@opentelemetry/sdk-metrics'

interface Series {
  readonly attributes: Attributes
  readonly counts: number[]
  count: number
  sum: number
}

/**
 * Histograms of one reader, recorded for the price of a look-up: the SDK's sort and stringify the attributes of every
 * single record, which is most of what metrics cost a request. They reach the reader as a producer's, beside the
 * SDK's own instruments.
 */
export class LocalHistograms implements MetricProducer {
  readonly #scope: { readonly name: string, readonly version: string, readonly schemaUrl: string }
  readonly #resource: Resource
  readonly #suffix: string
  readonly #histograms: LocalHistogram[] = []
  readonly #startTime = hrTime()

  /** @param suffix put behind names, as the exporter writes none for units */
  constructor (scope: { readonly name: string, readonly version: string, readonly schemaUrl: string }, resource: Resource, suffix: string) {
    this.#scope = scope
    this.#resource = resource
    this.#suffix = suffix
  }

  /** The meter, with these histograms in place of its own. */
  within (meter: Meter): Meter {
    return Object.assign(Object.create(meter) as Meter, {
      createHistogram: (name: string, options: MetricOptions = {}): Histogram => {
        const histogram = new LocalHistogram(name, options)
        this.#histograms.push(histogram)
        return histogram
      }
    })
  }

  collect (): Promise<CollectionResult> {
    const endTime = hrTime()
    const metrics = this.#histograms.filter(({ series }) => series.length > 0).map((histogram): HistogramMetricData => ({
      descriptor: { name: histogram.name + this.#suffix, description: histogram.description, unit: histogram.unit, valueType: ValueType.DOUBLE },
      aggregationTemporality: AggregationTemporality.CUMULATIVE,
      dataPointType: DataPointType.HISTOGRAM,
      dataPoints: histogram.series.map(({ attributes, counts, count, sum }) => ({
        startTime: this.#startTime,
        endTime,
        attributes,
        value: { buckets: { boundaries: [...histogram.bounds], counts: [...counts] }, count, sum }
      }))
    }))
    return Promise.resolve({ resourceMetrics: { resource: this.#resource, scopeMetrics: [{ scope: this.#scope, metrics }] }, errors: [] })
  }
}

class LocalHistogram implements Histogram {
  readonly name: string
  readonly description: string
  readonly unit: string
  readonly bounds: readonly number[]
  readonly series: Series[] = []
  /** Callers keep their attribute sets, so the object itself tells them apart at no cost. */
  readonly #known = new WeakMap<Attributes, Series>()

  constructor (name: string, { description = '', unit = '', advice }: MetricOptions) {
    this.name = name
    this.description = description
    this.unit = unit
    this.bounds = advice?.explicitBucketBoundaries ?? []
  }

  record (value: number, attributes: Attributes = NONE): void {
    const series = this.#known.get(attributes) ?? this.#find(attributes)
    series.count++
    series.sum += value
    const { bounds } = this
    let bucket = 0
    while (bucket < bounds.length && value > bounds[bucket]!) bucket++
    series.counts[bucket]!++
  }

  /** Another object may hold the same attributes. */
  #find (attributes: Attributes): Series {
    const key = keyOf(attributes)
    let series = this.series.find(one => keyOf(one.attributes) === key)
    if (series === undefined) {
      series = { attributes, counts: new Array<number>(this.bounds.length + 1).fill(0), count: 0, sum: 0 }
      this.series.push(series)
    }
    this.#known.set(attributes, series)
    return series
  }
}

const NONE: Attributes = Object.freeze({})

function keyOf (attributes: Attributes): string {
  return JSON.stringify(Object.entries(attributes).sort(([a], [b]) => a < b ? -1 : 1))
}

function hrTime (): [number, number] {
  const ms = Date.now()
  return [Math.floor(ms / 1_000), (ms % 1_000) * 1e6]
}
