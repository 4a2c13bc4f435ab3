import {
  context, isSpanContextValid, SpanKind, trace, TraceFlags,
  type Attributes, type AttributeValue, type Context, type Span, type SpanContext, type SpanOptions, type SpanStatus, type TextMapSetter, type TimeInput, type Tracer, type TracerProvider, type TraceState
} from '@opentelemetry/api'
import { W3CTraceContextPropagator } from '@opentelemetry/core'
import { spanTime } from '../../adapters/wire/spans.ts'
import { randomSpanId } from './ids.ts'
import type { SpanOrigin } from '../traces/stored-span.ts'
import { TraceRecord } from '../traces/trace-record.ts'
import type { TraceStore } from '../traces/trace-store.ts'

/**
 * The tracer of a process whose spans go to its own store and nowhere else. The SDK's spans are made for processors,
 * exporters, limits and samplers, none of which is there. What the store does not keep is not taken either: events
 * and links. Samples as the SDK does unless told otherwise: whatever the caller has not decided against.
 */
export class StoreTracerProvider implements TracerProvider {
  readonly #tracer: Tracer

  constructor (store: TraceStore, origin: SpanOrigin) {
    this.#tracer = new StoreTracer(store, origin)
  }

  getTracer (): Tracer {
    return this.#tracer
  }
}

class StoreTracer implements Tracer {
  readonly #store: TraceStore
  readonly #origin: SpanOrigin

  constructor (store: TraceStore, origin: SpanOrigin) {
    this.#store = store
    this.#origin = origin
  }

  startSpan (name: string, { kind = SpanKind.INTERNAL, startTime, attributes, root = false }: SpanOptions = {}, within: Context = context.active()): Span {
    const parent = root ? undefined : trace.getSpan(within)
    const start = millisOf(startTime)
    if (parent instanceof RecordedSpan) return parent.child(name, kind, start, attributes)
    const above = validContext(parent)
    if (above !== undefined && (above.traceFlags & TraceFlags.SAMPLED) === 0) {
      return trace.wrapSpanContext({ traceId: above.traceId, spanId: randomSpanId(), traceFlags: TraceFlags.NONE, ...stateOf(above) })
    }
    const record = new TraceRecord(this.#origin, start, above)
    return new RecordedSpan(this.#store, record, record.begin(name, kind, start), attributes, above?.traceState)
  }

  startActiveSpan<F extends (span: Span) => unknown> (name: string, ...rest: [F] | [SpanOptions, F] | [SpanOptions, Context, F]): ReturnType<F> {
    const fn = rest.at(-1) as (span: Span) => ReturnType<F>
    const options = rest.length > 1 ? rest[0] as SpanOptions : {}
    const within = rest.length > 2 ? rest[1] as Context : context.active()
    const span = this.startSpan(name, options, within)
    return context.with(trace.setSpan(within, span), fn, undefined, span)
  }
}

/** The W3C's headers. Of spans made here nothing needs to be checked. */
export class StorePropagator extends W3CTraceContextPropagator {
  override inject (from: Context, carrier: unknown, setter: TextMapSetter): void {
    const span = trace.getSpan(from)
    if (!(span instanceof RecordedSpan) || span.traceState !== undefined) return super.inject(from, carrier, setter)
    setter.set(carrier, 'traceparent', `00-${span.traceId}-${span.spanId}-01`)
  }
}

/** A row of a record, while it is under way. Its own span context, too. */
class RecordedSpan implements Span, SpanContext {
  readonly traceFlags = TraceFlags.SAMPLED
  readonly traceState?: TraceState
  readonly #store: TraceStore
  readonly #record: TraceRecord
  readonly #row: number
  #spanId: string | undefined

  constructor (store: TraceStore, record: TraceRecord, row: number, attributes: Attributes | undefined, state: TraceState | undefined) {
    this.#store = store
    this.#record = record
    this.#row = row
    if (state !== undefined) this.traceState = state
    if (attributes !== undefined) record.set(row, attributes)
  }

  get traceId (): string {
    return this.#record.traceId
  }

  get spanId (): string {
    this.#spanId ??= this.#record.spanId(this.#row)
    return this.#spanId
  }

  child (name: string, kind: SpanKind, start: number, attributes: Attributes | undefined): RecordedSpan {
    return new RecordedSpan(this.#store, this.#record, this.#record.begin(name, kind, start, this.#row), attributes, this.traceState)
  }

  spanContext (): SpanContext { return this }
  isRecording (): boolean { return this.#record.running(this.#row) }

  setAttributes (attributes: Attributes): this {
    if (this.isRecording()) this.#record.set(this.#row, attributes)
    return this
  }

  setAttribute (key: string, value: AttributeValue): this {
    return this.setAttributes({ [key]: value })
  }

  setStatus ({ code, message }: SpanStatus): this {
    if (this.isRecording()) this.#record.setStatus(this.#row, code, message)
    return this
  }

  updateName (name: string): this {
    if (this.isRecording()) this.#record.rename(this.#row, name)
    return this
  }

  end (endTime?: TimeInput): void {
    if (!this.isRecording()) return
    this.#record.end(this.#row, millisOf(endTime))
    this.#store.record(this.#record, this.#row)
  }

  addEvent (): this { return this }
  addLink (): this { return this }
  addLinks (): this { return this }
  recordException (): void {}
}

function validContext (span: Span | undefined): SpanContext | undefined {
  const found = span?.spanContext()
  return found !== undefined && isSpanContextValid(found) ? found : undefined
}

function stateOf ({ traceState }: SpanContext): { traceState?: TraceState } {
  return traceState === undefined ? {} : { traceState }
}

/** Below that a number is on the clock of `performance.now()`, as everywhere in OpenTelemetry. */
const UNIX_TIMES = performance.timeOrigin

function millisOf (time: TimeInput | undefined): number {
  if (time === undefined) return spanTime()
  if (typeof time === 'number') return time < UNIX_TIMES ? spanTime(performance.now() - time) : time
  return time instanceof Date ? time.getTime() : time[0] * 1e3 + time[1] / 1e6
}
