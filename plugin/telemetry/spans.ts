import { context, INVALID_SPAN_CONTEXT, isSpanContextValid, ProxyTracerProvider, SpanKind, trace, type Attributes, type Context, type Span, type Tracer, type TracerProvider } from '@opentelemetry/api'
import { VERSION } from '../../adapters/wire/version.ts'
import { failSpan, spanTime } from '../../adapters/wire/spans.ts'
import { randomTraceId } from './ids.ts'
import { parentContext, propagationHeaders, upstreamContext, type IncomingHeaders } from './propagation.ts'
import { ATTR, requestSpanName, SCHEMA_URL, SPAN, TRACER_NAME, type StageSpanName } from '../../adapters/wire/semconv.ts'

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
  /** `traceparent` and `tracestate` for an upstream call made in this stage: each time a new object, to which others may be added. */
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

/** The span of a whole request. It ends at the last byte, so it is ended by hand, exactly once. */
export interface RequestTrace extends StageSpan {
  /** For the header x-epd-trace-id. Without an SDK the client's own, failing that a random one that is in no trace. */
  readonly traceId: string
  readonly context: Context
  /** Like {@link StageSpan.stage} for something synchronous, such as planning. */
  stageSync<T> (name: StageSpanName, attributes: Attributes, run: (span: StageSpan) => T): T
  end (outcome?: Outcome): void
}

export interface OpenStage extends StageSpan {
  readonly context: Context
  end (outcome?: Outcome): void
}

const MIN_RECEIVE_MS = 5
/** The span of every request that has neither an SDK nor a caller's trace. */
const NO_SPAN = trace.wrapSpanContext(INVALID_SPAN_CONTEXT)

let lastProvider: TracerProvider | undefined
let lastTracer: Tracer | undefined

/** Asked for at each request, as an SDK may come up after this module was loaded. Undefined while there is none. */
function currentTracer (): Tracer | undefined {
  const global = trace.getTracerProvider()
  const proxied = global instanceof ProxyTracerProvider
  const provider = proxied ? global.getDelegate() : global
  if (provider !== lastProvider) {
    lastProvider = provider
    lastTracer = proxied ? global.getDelegateTracer(TRACER_NAME, VERSION, { schemaUrl: SCHEMA_URL }) : global.getTracer(TRACER_NAME, VERSION, { schemaUrl: SCHEMA_URL })
  }
  return lastTracer
}

/** What a tracer without an SDK starts: the caller's span, to be named upstream. */
function shellOf (parent: Context): Span {
  const caller = trace.getSpanContext(parent)
  return caller === undefined ? NO_SPAN : trace.wrapSpanContext(caller)
}

/**
 * Starts `chat {model}`, a CLIENT span: the gateway is a client of model servers. Its parent is the active span when
 * another instrumentation has one, else the caller's `traceparent`.
 */
export function startRequest (options: RequestTraceOptions): RequestTrace {
  const operation = options.operation ?? 'chat'
  const parent = parentContext(options.headers)
  const tracer = currentTracer()
  if (tracer === undefined) return new Traced(undefined, shellOf(parent), parent, options.headers)
  const receiving = options.arrivedAt === undefined ? 0 : performance.now() - options.arrivedAt
  const startTime = spanTime(receiving)
  const span = tracer.startSpan(requestSpanName(operation, options.model), {
    kind: SpanKind.CLIENT,
    startTime,
    // What a sampler may go by. All others are set on a span that is recorded: here they would be copied three times over.
    attributes: { [ATTR.operation]: operation, [ATTR.provider]: TRACER_NAME, [ATTR.requestModel]: options.model }
  }, parent)
  // Marked once: the stages' contexts are made from this one.
  const traced = new Traced(tracer, span, upstreamContext(parent), options.headers)
  if (options.attributes !== undefined) traced.set(options.attributes)
  // Worth a span only where it took time: a large body, or a slow client.
  if (traced.recording && receiving >= MIN_RECEIVE_MS) tracer.startSpan(SPAN.receive, { startTime }, traced.context).end(spanTime())
  return traced
}

/** A span with its context and the headers that carry it on. One class for the request and its stages: they differ by parent only. */
class Traced implements RequestTrace, OpenStage {
  readonly recording: boolean
  readonly #parent: Context
  #context: Context | undefined
  readonly #tracer: Tracer | undefined
  readonly #span: Span
  readonly #incoming: IncomingHeaders
  #idle: Idle | undefined
  #traceId: string | undefined
  #ended = false

  constructor (tracer: Tracer | undefined, span: Span, parent: Context, incoming: IncomingHeaders) {
    this.#tracer = tracer
    this.#span = span
    this.#incoming = incoming
    this.recording = span.isRecording()
    this.#parent = parent
  }

  /** Made when it is asked for: a context is a copy of all that is in its parent, and a stage without calls needs none. */
  get context (): Context {
    // Without an SDK the span is a shell around the parent's context, and putting it in a context would change nothing.
    this.#context ??= this.recording || (this.#span !== NO_SPAN && isSpanContextValid(this.#span.spanContext())) ? trace.setSpan(this.#parent, this.#span) : this.#parent
    return this.#context
  }

  get traceId (): string {
    this.#traceId ??= this.#nameTrace()
    return this.#traceId
  }

  get headers (): Record<string, string> {
    return propagationHeaders(this.context, this.#incoming)
  }

  #nameTrace (): string {
    const own = this.#span.spanContext()
    if (this.recording || (this.#span !== NO_SPAN && isSpanContextValid(own))) return own.traceId
    return this.headers.traceparent?.split('-')[1] ?? randomTraceId()
  }

  set (attributes: Attributes): void {
    if (this.recording) this.#span.setAttributes(attributes)
  }

  run<T> (fn: () => T): T {
    return context.with(this.context, fn)
  }

  begin (name: StageSpanName, attributes: Attributes): OpenStage {
    if (!this.recording || this.#tracer === undefined) {
      this.#idle ??= new Idle(this)
      return this.#idle
    }
    const span = this.#tracer.startSpan(name, { startTime: spanTime() }, this.context)
    span.setAttributes(attributes)
    return new Traced(this.#tracer, span, this.context, this.#incoming)
  }

  /** Not an async function: it would put off what waits for the stage by turns of the microtask queue, and cost more. */
  stage<T> (name: StageSpanName, attributes: Attributes, run: (span: StageSpan) => Promise<T>): Promise<T> {
    const stage = this.begin(name, attributes)
    const failed = (error: unknown): never => {
      stage.end({ error })
      throw error
    }
    try {
      return stage.run(() => run(stage)).then(result => {
        stage.end()
        return result
      }, failed)
    } catch (error) {
      return failed(error)
    }
  }

  stageSync<T> (name: StageSpanName, attributes: Attributes, run: (span: StageSpan) => T): T {
    const stage = this.begin(name, attributes)
    try {
      const result = run(stage)
      stage.end()
      return result
    } catch (error) {
      stage.end({ error })
      throw error
    }
  }

  end (outcome: Outcome = {}): void {
    if (this.#ended) return
    this.#ended = true
    if (!this.recording) return
    close(this.#span, outcome)
    this.#span.end(spanTime())
  }
}

/** Every stage of a request that is not recorded, without an SDK or by its sampler's choice: nothing but the headers to pass on. */
class Idle implements OpenStage {
  readonly recording = false
  readonly #request: Traced

  constructor (request: Traced) {
    this.#request = request
  }

  get headers (): Record<string, string> { return this.#request.headers }
  get context (): Context { return this.#request.context }
  set (): void {}
  end (): void {}
  begin (): OpenStage { return this }
  run<T> (fn: () => T): T { return this.#request.run(fn) }
  stage<T> (_name: StageSpanName, _attributes: Attributes, run: (span: StageSpan) => Promise<T>): Promise<T> { return run(this) }
}

function close (span: Span, { error, aborted, attributes }: Outcome): void {
  if (attributes !== undefined) span.setAttributes(attributes)
  if (aborted === true) span.setAttribute(ATTR.aborted, true)
  else if (error !== undefined) failSpan(span, error)
}
