import { context, SpanKind, trace, type Attributes, type Context, type Span, type Tracer } from '@opentelemetry/api'
import { failSpan, spanTime } from '../../adapters/wire/spans.ts'
import { ATTR, SPAN, TRACER_NAME, type StageSpanName } from '../../adapters/wire/semconv.ts'
import { callersTraceId, parentContext, propagationHeaders, type IncomingHeaders } from './propagation.ts'
import type { Tracing } from './tracing.ts'

export interface RequestTraceOptions {
  /** Headers of the client's request, for its trace context. */
  readonly headers: IncomingHeaders
  readonly model: string
  /** `chat` or `text_completion`. @default 'chat' */
  readonly operation?: string
  readonly attributes?: Attributes
  /** When its body began to arrive, on the clock of `performance.now()`. @default now */
  readonly arrivedAt?: number | undefined
}

/** How a request or stage ended. Nothing given: well. */
export interface Outcome {
  readonly error?: unknown
  /** The client went away: the span ends without an error. */
  readonly aborted?: boolean
  readonly attributes?: Attributes
}

/** One stage of a request, for the function it wraps. */
export interface StageSpan {
  /** `traceparent` and `tracestate` for an upstream call made in this stage: a new object each time, to which the caller may add others. */
  readonly headers: Record<string, string>
  /** Attributes cost work: gather the expensive ones only when this is true. */
  readonly recording: boolean
  set (attributes: Attributes): void
  /** A child of this stage, such as one call of a fan-out. */
  stage<T> (name: StageSpanName, attributes: Attributes, run: (span: StageSpan) => Promise<T>): Promise<T>
  /** A child that does not fit a wrapped function: started here, ended by hand. */
  begin (name: StageSpanName, attributes: Attributes): OpenStage
  /** Runs `fn` with this stage as the active span. Every upstream call is made in one, for clients that are instrumented. */
  run<T> (fn: () => T): T
}

export interface OpenStage extends StageSpan {
  readonly context: Context
  end (outcome?: Outcome): void
}

/** The span of a whole request. It ends at the last byte, so it is ended by hand, exactly once. */
export interface RequestTrace extends OpenStage {
  /** Of the recorded trace, else of the client's `traceparent`; for logs. */
  readonly traceId: string | undefined
  /** Will the trace be in the gateway's store? Only then may the header x-epd-trace-id name it. */
  readonly kept: boolean
}

const MIN_RECEIVE_MS = 5

/**
 * Starts `chat {model}`, a CLIENT span: the gateway is a client of model servers. Its parent is the active span when
 * another instrumentation has one, else the caller's `traceparent`.
 */
export function startRequest (tracing: Tracing, { headers, model, operation = 'chat', attributes, arrivedAt }: RequestTraceOptions): RequestTrace {
  const parent = parentContext(headers)
  const { tracer } = tracing
  const receiving = arrivedAt === undefined ? 0 : performance.now() - arrivedAt
  const startTime = tracer === undefined ? 0 : spanTime(receiving)
  // Low cardinality, as the conventions ask.
  const name = model === '' ? operation : `${operation} ${model}`
  const span = tracer?.startSpan(name, {
    kind: SpanKind.CLIENT,
    startTime,
    attributes: { [ATTR.operation]: operation, [ATTR.provider]: TRACER_NAME, [ATTR.requestModel]: model, ...attributes }
  }, parent)
  const traced = new Traced({ tracing, tracer, incoming: headers }, span, parent)
  // Worth a span only where it took time: a large body, or a slow client.
  if (receiving >= MIN_RECEIVE_MS) traced.begin(SPAN.receive, {}, startTime).end()
  return traced
}

/** What the spans of one request share. */
interface Shared { readonly tracing: Tracing, readonly tracer: Tracer | undefined, readonly incoming: IncomingHeaders }

/** A span with its context and the headers that carry it on: the request's or a stage's, which differ by parent only. */
class Traced implements RequestTrace {
  readonly recording: boolean
  readonly context: Context
  readonly #shared: Shared
  readonly #span: Span | undefined
  #ended = false

  /** @param span undefined without a tracer, and for the stages of a request that is not recorded */
  constructor (shared: Shared, span: Span | undefined, parent: Context) {
    this.#shared = shared
    this.#span = span
    this.recording = span?.isRecording() === true
    this.context = span === undefined ? parent : trace.setSpan(parent, span)
  }

  get traceId (): string | undefined {
    return this.recording ? this.#span!.spanContext().traceId : callersTraceId(this.#shared.incoming)
  }

  get kept (): boolean {
    return this.recording && this.#shared.tracing.keeps(this.#span!)
  }

  get headers (): Record<string, string> {
    return propagationHeaders(this.context, this.#shared.incoming)
  }

  set (attributes: Attributes): void {
    this.#span?.setAttributes(attributes)
  }

  run<T> (fn: () => T): T {
    return this.#shared.tracer === undefined ? fn() : context.with(this.context, fn)
  }

  begin (name: StageSpanName, attributes: Attributes, startTime?: number): OpenStage {
    const span = this.recording ? this.#shared.tracer?.startSpan(name, { startTime: startTime ?? spanTime(), attributes }, this.context) : undefined
    return new Traced(this.#shared, span, this.context)
  }

  async stage<T> (name: StageSpanName, attributes: Attributes, run: (span: StageSpan) => Promise<T>): Promise<T> {
    const stage = this.begin(name, attributes)
    try {
      const result = await stage.run(() => run(stage))
      stage.end()
      return result
    } catch (error) {
      stage.end({ error })
      throw error
    }
  }

  end ({ error, aborted, attributes }: Outcome = {}): void {
    if (this.#ended || this.#span === undefined) return
    this.#ended = true
    if (attributes !== undefined) this.set(attributes)
    if (aborted === true) this.set({ [ATTR.aborted]: true })
    else if (error !== undefined) failSpan(this.#span, error)
    this.#span.end(spanTime())
    this.#shared.tracing.keep(this.#span)
  }
}
