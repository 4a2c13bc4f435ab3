import type { LeaseTable } from '../../cache/index.ts'
import type { FeatureCache } from '../../cache/feature-cache.ts'
import type { VisionRunner } from '../../encoder/vision.ts'
import { FEATURES_FORMAT, KV_FORMAT } from '../../../adapters/wire/results.ts'
import { ROLE_TO_WIRE } from '../../../adapters/wire/roles.ts'
import {
  ONE_DEVICE, type ChatAnswer, type ChatCall, type EngineBackend, type EngineCounters, type EngineInfo, type EngineLog, type EngineService, type GaugeName, type RequestLimits
} from '../../service/engine-service.ts'
import { EngineError } from '../../service/errors.ts'
import { LeaseGrants } from '../../cache/lease-grants.ts'
import type { LoadedModel } from '../../models/family.ts'
import type { P2PNode } from '../../p2p/node.ts'
import type { Json } from './fields.ts'
import { checkForm } from './answer-form.ts'
import { answer, answerHead } from './answer.ts'
import type { LlmRole, RequestTarget } from './control-fields.ts'
import { Handoff } from './handoff.ts'
import { readCall, readChat, readCompletion, readResponse, type ParsedRequest } from './request.ts'
import { Generation } from './generation.ts'
import { PreparedRequests, type PreparedParts } from './prepared.ts'
import type { RemoteMedia } from '../sequence/prompt.ts'
import { buildPrompts } from './prompt-builder.ts'
import { responseShape } from './response-shape.ts'
import { checkMessages, toolForm } from './tools.ts'
import { chatShape, completionShape, type AnswerHead, type AnswerShape } from './shape.ts'
import { Grammar } from '../grammar/constraint.ts'
import type { Vocabulary } from '../grammar/vocabulary.ts'
import type { BatchScheduler } from '../scheduler/batch-scheduler.ts'
import type { PromptText } from '../text/prompt-text.ts'
import type { LlmEngine } from '../engine.ts'
import type { Runner } from '../runner/runner.ts'
import { SEQUENCE_STATES } from '../sequence/states.ts'
import type { Tokenizer } from '../text/tokenizer.ts'

/** The parts of a running engine; built while `ready` is pending. */
export interface LlmRuntime {
  readonly engine: LlmEngine
  readonly runner: Runner
  /** Absent with `--no-vision`. */
  readonly vision: VisionRunner | undefined
  readonly tokenizer: Tokenizer
  readonly text: PromptText
  /** The tokens as grammars see them; made for the first request that has one. */
  vocabulary (): Promise<Vocabulary>
}

export interface LlmServiceParts {
  readonly engineId: string
  readonly role: LlmRole
  readonly backend: EngineBackend
  readonly version: string
  readonly leases: LeaseTable
  readonly leaseMs?: number | undefined
  readonly model: LoadedModel
  readonly vision: boolean
  readonly features: FeatureCache
  /** Pulled features only pass through `features`, one item at a time. */
  readonly staging: boolean
  /** It takes up what encoders offer. */
  readonly pullsAhead?: boolean | undefined
  readonly scheduler: BatchScheduler
  readonly p2p: P2PNode
  readonly counters: EngineCounters
  readonly log: EngineLog
  readonly blockTokens: number
  /** Most sequences that run or wait; further ones are refused as `busy`. */
  readonly maxLive: number
  readonly info: Pick<EngineInfo, 'feature' | 'kv'>
  readonly runtime: Promise<LlmRuntime>
}

/** A request from its arrival to the end of its last sequence. */
interface OpenRequest {
  readonly requestId: string
  readonly stop: AbortController
  readonly sessionId: number | undefined
}

/** What differs between the APIs. */
interface Api {
  read (body: Json, target: RequestTarget): ParsedRequest
  /** Of the answer's id. */
  readonly prefix: string
  shape (head: AnswerHead, tokenizer: Tokenizer, body: Json): AnswerShape
}

/** What links carry, by role, as `<kind of blocks>:<protocol>/<version>`. */
const CARRIED: Readonly<Record<LlmRole, Pick<EngineInfo, 'produces' | 'accepts'>>> = {
  hybrid: { produces: [], accepts: [FEATURES_FORMAT] },
  prefill: { produces: [KV_FORMAT], accepts: [FEATURES_FORMAT] },
  decode: { produces: [], accepts: [KV_FORMAT] }
}

/** An LLM engine as its api_server sees it: requests in, sequences through the engine, answers out. */
export class LlmService implements EngineService {
  readonly role: LlmRole
  readonly backend: EngineBackend
  readonly model: LoadedModel
  readonly epoch: number
  readonly p2p: P2PNode
  readonly counters: EngineCounters
  readonly ready: Promise<void>
  readonly #parts: LlmServiceParts
  readonly #grants: LeaseGrants
  readonly #target: RequestTarget
  #runtime: LlmRuntime | undefined
  readonly #open = new Set<OpenRequest>()
  readonly #prepared = new PreparedRequests()
  #preparing = false
  /** Sequences of requests that were let in and whose prompts are being made. */
  #coming = 0
  #closing: Promise<void> | undefined

  constructor (parts: LlmServiceParts) {
    this.#parts = parts
    this.#grants = new LeaseGrants(parts)
    this.#target = parts
    this.role = parts.role
    this.backend = parts.backend
    this.model = parts.model
    this.epoch = parts.leases.epoch
    this.p2p = parts.p2p
    this.counters = parts.counters
    this.ready = parts.runtime.then(runtime => { this.#runtime = runtime })
    // Awaited by the api_server; without a handler a failure before that would end the process.
    this.ready.catch(() => {})
  }

  /** The running parts, for tests and measurements; undefined until `ready`. */
  get runtime (): LlmRuntime | undefined {
    return this.#runtime
  }

  get problem (): string | undefined {
    const { runner, vision } = this.#runtime ?? {}
    return runner?.problem ?? vision?.problem ?? this.p2p.problem
  }

  info (): EngineInfo {
    const { model, scheduler, version, blockTokens, vision, pullsAhead, info } = this.#parts
    return {
      ...ONE_DEVICE,
      block_size: blockTokens,
      num_gpu_blocks: scheduler.stats.total,
      version,
      backend: this.backend,
      role: ROLE_TO_WIRE[this.role],
      epoch: this.epoch,
      model: model.name,
      fingerprint: model.fingerprint,
      vision: this.role === 'decode' ? 'none' : vision ? 'full' : 'features',
      ...CARRIED[this.role],
      ...pullsAhead === true ? { pulls_ahead: true } : {},
      ...info
    }
  }

  get limits (): RequestLimits | undefined {
    return this.#runtime?.text.limits
  }

  gauges (): Partial<Record<GaugeName, number>> {
    const features = this.#parts.features.stats
    const kv = this.#parts.scheduler.stats
    // A decode engine has no features.
    const featureGauges = this.role === 'decode' ? {} : { epd_feature_blocks_capacity: features.total, epd_feature_blocks_free: features.free, epd_feature_blocks_cached: features.cached }
    return {
      ...featureGauges,
      epd_kv_blocks_capacity: kv.total,
      epd_kv_blocks_free: kv.free,
      epd_kv_blocks_cached: kv.cached,
      epd_kv_blocks_spilled: kv.spilled ?? 0,
      epd_leases_open: this.#grants.openCount
    }
  }

  /** Live sequences by state; one that has ENDED is gone. */
  sequences (): Readonly<Record<string, number>> {
    const counts = Object.fromEntries(SEQUENCE_STATES.map(state => [state, 0]))
    for (const { state } of this.#runtime?.engine.live ?? []) counts[state] = (counts[state] ?? 0) + 1
    return counts
  }

  async chat (call: ChatCall): Promise<ChatAnswer> {
    return await this.#serve(call, { read: readChat, prefix: 'chatcmpl-', shape: chatShape })
  }

  async completions (call: ChatCall): Promise<ChatAnswer> {
    return await this.#serve(call, { read: readCompletion, prefix: 'cmpl-', shape: completionShape })
  }

  async responses (call: ChatCall): Promise<ChatAnswer> {
    return await this.#serve(call, { read: readResponse, prefix: 'resp_', shape: responseShape })
  }

  async #serve (call: ChatCall, { read, prefix, shape: shapeOf }: Api): Promise<ChatAnswer> {
    if (this.#closing !== undefined) throw new EngineError('draining', 'the engine is shutting down')
    const { body, sessionId } = readCall(call.body, this.model)
    if (call.ahead === true) return await this.#prepare(call, read(body, { ...this.#target, ahead: true }))
    const request = read(body, this.#target)
    const runtime = this.#runtime ?? await this.#parts.runtime
    const admitted = this.#admit(runtime, request)
    let open: OpenRequest
    try {
      open = this.#register(call, sessionId)
    } catch (err) {
      this.#coming -= admitted
      throw err
    }
    const { stop } = open
    this.#prepared.begin(call.requestId, runtime.engine)
    const handoff = request.preserve ? new Handoff({ engineId: this.#parts.engineId, grants: this.#grants, engine: runtime.engine }, call) : undefined
    let generation: Generation
    try {
      const { features, staging } = this.#parts
      const { toolFormat } = runtime.text
      if (request.input.kind === 'chat') checkMessages(request.input.messages, toolFormat)
      const form = request.form ?? (request.tools === undefined ? undefined : toolForm(request.tools, toolFormat))
      checkForm(form, request.params)
      const grammar = form === undefined
        ? undefined
        : new Grammar(form, { vocabulary: await runtime.vocabulary(), tokenizer: runtime.tokenizer, eosIds: this.model.text.eosIds })
      const prompts = await buildPrompts(request, { ...runtime, model: this.model, features, staging }, { signal: stop.signal, context: call.context, tenant: call.tenant })
      const parts = { engine: runtime.engine, features, tokenizer: runtime.tokenizer, grammar, tools: toolFormat === 'tagged' ? request.tools : undefined, keep: handoff?.keep }
      generation = new Generation(parts, call, prompts, request.params, () => this.#open.delete(open))
    } catch (err) {
      this.#open.delete(open)
      throw err
    } finally {
      this.#coming -= admitted
    }
    const onAbort = (): void => generation.cancel(stop.signal.reason as Error)
    if (stop.signal.aborted) onAbort()
    else stop.signal.addEventListener('abort', onAbort, { once: true })
    const head = answerHead(prefix, this.model)
    const shape = shapeOf(head, runtime.tokenizer, body)
    const answered = await answer(generation, shape, request.params)
    return handoff !== undefined && 'json' in answered ? { ...answered, json: { ...answered.json as object, ...handoff.answer() } } : answered
  }

  /** The request comes later: its text is tokenised now, unless there is other work. */
  async #prepare (call: ChatCall, { input }: ParsedRequest): Promise<ChatAnswer> {
    const answer = { status: 200, json: {} }
    if (this.#runtime === undefined || this.#preparing || this.#open.size > 0 || input.kind !== 'chat' || input.items.length === 0) return answer
    const { messages, kwargs, items } = input
    this.#preparing = true
    try {
      const tokens = await this.#runtime.text.prepare({ input: { messages, kwargs }, param: 'messages' }, call.signal)
      this.#prepared.add(call, tokens, items.length, this.#preparedParts(this.#runtime))
    } finally {
      this.#preparing = false
    }
    return answer
  }

  #preparedParts ({ engine }: LlmRuntime): PreparedParts {
    const { model, features, blockTokens } = this.#parts
    return { engine, model, features, blockTokens, busy: this.#open.size > 0 }
  }

  /** Features came ahead of their request. @param name see {@link PreparedRequests.arrived} */
  arrived (name: string, media: RemoteMedia): void {
    if (this.#runtime !== undefined) this.#prepared.arrived(name, media, this.#preparedParts(this.#runtime))
  }

  /**
   * Registers a call. The controller's signal aborts with an EngineError, also when the client closed the request. A client
   * that left may come again with its id while a forward pass still computes its sequence.
   */
  #register ({ requestId, signal }: ChatCall, sessionId: number | undefined): OpenRequest {
    if (sessionId !== undefined && [...this.#open].some(request => request.sessionId === sessionId)) {
      throw new EngineError('invalid_request', `The session_id ${sessionId} is occupied.`, { param: 'session_id' })
    }
    const stop = new AbortController()
    const onAbort = (): void => stop.abort(EngineError.is(signal.reason) ? signal.reason : new EngineError('cancelled', 'the client closed the request'))
    if (signal.aborted) onAbort()
    else signal.addEventListener('abort', onAbort, { once: true })
    const open = { requestId, stop, sessionId }
    this.#open.add(open)
    return open
  }

  /** How many sequences the request may make. */
  #admit ({ engine }: LlmRuntime, { params, texts }: ParsedRequest): number {
    const wanted = params.n * texts
    const { maxLive } = this.#parts
    if (wanted > maxLive) throw new EngineError('invalid_request', `the request asks for ${wanted} choices in all, this engine holds ${maxLive}`, { param: 'n' })
    // What is computed ahead gives way.
    const live = engine.live.size - this.#prepared.running + this.#coming
    if (live + wanted > maxLive) throw new EngineError('busy', `${live} sequences already run or wait`)
    this.#coming += wanted
    return wanted
  }

  /** Also ends the leases of a request that was answered: a caller that aborts it has not read the answer. */
  abort (requestId: string): boolean {
    const found = [...this.#open].filter(request => request.requestId === requestId)
    for (const { stop } of found) stop.abort(new EngineError('cancelled', 'the request was aborted'))
    return this.#grants.release(requestId) || found.length > 0
  }

  abortSession (sessionId: number): boolean {
    const found = [...this.#open].find(request => request.sessionId === sessionId)
    return found !== undefined && this.abort(found.requestId)
  }

  endSession (id: number | string): void {
    this.#grants.endSession(id)
  }

  clearCache (): void {
    this.#parts.features.clear()
    this.#parts.scheduler.clear()
  }

  close (): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close (): Promise<void> {
    const error = new EngineError('draining', 'the engine is shutting down')
    for (const { stop } of this.#open) stop.abort(error)
    const runtime = await this.#parts.runtime.catch(() => undefined)
    await runtime?.engine.close()
    await Promise.all([runtime?.runner.close(), runtime?.vision?.close(), runtime?.text.close()])
    await this.p2p.close()
    this.#grants.close()
  }
}
