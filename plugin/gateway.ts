import { randomBytes } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'
import { metrics } from '@opentelemetry/api'
import type { Dispatcher } from 'undici'
import type { Log } from '../adapters/adapter.ts'
import { Connections } from '../adapters/http/connections.ts'
import { createVllm } from '../adapters/index.ts'
import { epdError } from './errors.ts'
import type { ResolvedOptions } from './options/index.ts'
import type { GatewayParts } from './parts.ts'
import { Admission, Callers, encoderPool, InFlight, MediaCheck, serve, Stats, Timings, type Core, type Deliver, type GatewayRequest, type Served } from './pipeline/index.ts'
import { planRequest, type Plan, type Refusal, type RequestView } from './planning/index.ts'
import { Registry } from './registry/index.ts'
import { feedMeter } from './telemetry/instruments.ts'
import { GatewayMetrics } from './telemetry/metrics.ts'
import { uninstrumented } from './telemetry/propagation.ts'
import { Tracing } from './telemetry/tracing.ts'
import { chosen, GATEWAY_HEADER } from '../adapters/wire/headers.ts'
import { SCHEMA_URL, TRACER_NAME } from '../adapters/wire/semconv.ts'
import type { Thumbnails } from './ui/thumbnails.ts'
import { VERSION } from '../adapters/wire/version.ts'

export interface GatewayInit {
  readonly options: ResolvedOptions
  readonly log: Log
  /** Takes the place of the gateway's own connections; the caller closes it. */
  readonly dispatcher?: Dispatcher
  /** Makes and keeps spans. @default those of the application's OpenTelemetry SDK, if there is one; they are not kept */
  readonly tracing?: Tracing
  /** Keeps small copies of the pictures of traced requests. */
  readonly thumbnails?: Thumbnails | undefined
  readonly parts?: GatewayParts
}

export interface Health {
  readonly status: 'healthy' | 'no_healthy_node' | 'draining'
  /** `resting`: healthy ones of which a circuit breaker is open. */
  readonly nodes: { readonly healthy: number, readonly resting: number, readonly total: number }
  readonly models: readonly string[]
}

/**
 * The framework-free core: registry, planner and pipeline. Usable without Fastify: `serve` takes a request and a
 * function that sends the answer to the client.
 */
export class Gateway implements Core {
  /** A reload puts others in their place. */
  options: ResolvedOptions
  readonly registry: Registry
  readonly dispatcher: Dispatcher
  readonly admission: Admission
  readonly stats = new Stats()
  readonly requests = new InFlight()
  readonly callers = new Callers()
  readonly timings = new Timings()
  mediaCheck: MediaCheck
  readonly metrics = new GatewayMetrics()
  readonly tracing: Tracing
  readonly thumbnails: Thumbnails | undefined
  readonly log: Log
  readonly #id = randomBytes(8).toString('hex')
  readonly #onlyHere = { [GATEWAY_HEADER]: this.#id }
  readonly #ownDispatcher: Connections | undefined
  readonly #unfeed: () => void
  readonly #inFlight: () => number
  #closed: Promise<void> | undefined

  constructor ({ options, log, dispatcher, tracing = new Tracing(), thumbnails, parts = {} }: GatewayInit) {
    this.options = options
    this.log = log
    this.tracing = tracing
    this.thumbnails = thumbnails
    const { timeouts } = options
    this.#ownDispatcher = dispatcher === undefined ? new Connections(timeouts.connect) : undefined
    this.dispatcher = uninstrumented(dispatcher ?? this.#ownDispatcher!)
    this.#inFlight = parts.inFlight ?? (() => this.requests.size)
    this.admission = new (parts.Admission ?? Admission)(options.admission, model => encoderPool(this.registry.snapshot(), model), this.metrics.waits)
    this.mediaCheck = new MediaCheck(options.media)
    this.#unfeed = feedMeter(metrics.getMeter(TRACER_NAME, VERSION, { schemaUrl: SCHEMA_URL }), this)
    this.registry = new Registry({
      dispatcher: this.dispatcher,
      log,
      adapters: [...options.adapters, createVllm(options.vllm)],
      probeTimeout: timeouts.probe,
      linkTimeout: timeouts.link,
      stages: parts.stages ?? this.metrics.stages,
      headers: { [GATEWAY_HEADER]: this.#id }
    })
    for (const node of options.nodes) this.registry.add(node, { configured: true })
  }

  /**
   * Headers of the calls of a request: the client's that are forwarded, the gateways that it has passed, and this one.
   *
   * @throws EPD_ERR_LOOP when this one is among them
   */
  via (incoming: IncomingHttpHeaders): Readonly<Record<string, string>> {
    const { [GATEWAY_HEADER]: passed } = incoming
    if (passed?.includes(this.#id) === true) throw epdError('EPD_ERR_LOOP')
    const own = passed === undefined ? this.#onlyHere : { [GATEWAY_HEADER]: `${String(passed)}, ${this.#id}` }
    return this.options.forwardHeaders.length === 0 ? own : { ...chosen(incoming, this.options.forwardHeaders), ...own }
  }

  /** No longer takes requests. */
  get draining (): boolean {
    return this.requests.closing
  }

  /** `healthy`: a request would find a node. */
  get health (): Health {
    const { nodes, models } = this.registry.snapshot()
    const healthy = nodes.filter(node => node.state === 'healthy')
    const resting = healthy.filter(({ breakers: { encode, prefill, decode } }) => [encode, prefill, decode].includes('open')).length
    const ready = models.length > 0 || healthy.some(node => node.role === 'hybrid')
    return { status: this.draining ? 'draining' : ready ? 'healthy' : 'no_healthy_node', nodes: { healthy: healthy.length, resting, total: nodes.length }, models }
  }

  /** Is there a node, healthy or not, that answers for this model? */
  serves (model: string): boolean {
    return this.registry.snapshot().nodes.some(node => node.role !== 'encoder' && node.models.includes(model))
  }

  /** The plan such a request would get now. */
  plan (view: RequestView): Plan | Refusal {
    return planRequest(view, this.registry.snapshot(), this.options)
  }

  /** Serves one request; see the pipeline's `serve`. Answers EPD_ERR_CLOSING while draining. */
  serve (request: GatewayRequest, deliver: Deliver): Promise<Served> {
    return serve(this, request, deliver)
  }

  /** Requests in flight. */
  get inFlight (): number {
    return this.#inFlight()
  }

  /** Takes no more requests, and resolves when those in flight have ended, by themselves within `graceMs` or by force. */
  async drain (graceMs: number = this.options.timeouts.grace): Promise<void> {
    await this.requests.drain(graceMs, requests => {
      this.log.warn({ requests }, 'grace time is over; ending the requests in flight')
      return epdError('EPD_ERR_CLOSING')
    })
  }

  /** Drains, releases what nodes hold for this gateway, closes every connection and timer. Idempotent. */
  async close (): Promise<void> {
    this.#closed ??= this.#close()
    await this.#closed
  }

  async #close (): Promise<void> {
    await this.drain()
    await this.requests.settled()
    await this.registry.close()
    this.#unfeed()
    await this.thumbnails?.close()
    await this.mediaCheck.close()
    await this.tracing.close()
    await this.#ownDispatcher?.close()
  }
}
