import { createHash } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { abortable, TimeLimit } from '../../adapters/abort.ts'
import { AdapterError, type Call, type MediaItem } from '../../adapters/adapter.ts'
import type { JsonAnswer } from '../../adapters/http/json.ts'
import { callEncoder, encoderError, namesReceiver, requestIdOf, urlOf, type EncodeRequest, type PartMeta } from '../../adapters/sglang/encoder.ts'
import { PUSHED } from '../../adapters/sglang/info.ts'
import { REQUEST_ID_HEADER } from '../../adapters/wire/headers.ts'
import { numberOf, objectOf } from '../../adapters/wire/json.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import { fingerprint } from '../body/index.ts'
import { epdError } from '../errors.ts'
import type { Gateway } from '../gateway.ts'
import { exhaustedError, verdictOn, type Caller } from '../pipeline/index.ts'
import { byAffinity } from '../planning/index.ts'
import { usableOf, type NodeSnapshot } from '../registry/index.ts'
import type { Part } from './parts.ts'

/** Pause before encoders that have all failed are tried again, in milliseconds. */
const AGAIN_MS = 500
/** How long an encoder's own error may take after it has said that there are no metadata, in milliseconds. */
const ERROR_MS = 1_000
/** Stands for a picture that can't be read, in a request whose client has its error already: 64 x 64, grey. */
const BLANK = 'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAS0lEQVR42u3PMQ0AAAwDoEqv9ErYvQQckD4XAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAYHLAB8+AWnmfUycAAAAAElFTkSuQmCC'
const UNKNOWN_TOKENS = 1_024

/**
 * Encodes one part for a language server: chooses the encoder, moves to another while nothing has reached the language
 * server, and lets the encoder push to it. A language server with `zmq_to_scheduler` ends when a part fails. So for a part
 * whose receivers are held back, encoders are tried until the time is up; a picture that can't be read becomes a blank one
 * when the client of the request has its error.
 */
export class PartEncoding {
  readonly #gateway: Gateway
  readonly #part: Part
  readonly #request: EncodeRequest
  readonly #bytes: Buffer
  readonly #signal: TimeLimit
  readonly #keys: readonly string[]
  readonly #caller: Caller | undefined
  readonly #items: readonly MediaItem[]
  readonly #tokens: number
  /** The receivers come by calls of their own, and are held back until the encoder has read the pictures. */
  readonly #holdsBack: boolean
  readonly #since = performance.now()
  #blank = false

  /** @param signal ends it: the language server has left, the gateway closes, the language server waits no longer */
  constructor (gateway: Gateway, part: Part, request: EncodeRequest, bytes: Buffer, signal: TimeLimit) {
    this.#gateway = gateway
    this.#part = part
    this.#request = request
    this.#bytes = bytes
    this.#signal = signal
    this.#keys = request.mm_items.map(item => fingerprint(Buffer.from(urlOf(item))))
    this.#caller = gateway.callers.find(requestIdOf(request.req_id), () => pictureHashes(request))
    this.#items = this.#caller?.claim(this.#keys) ?? []
    const known = this.#items.reduce((sum, { tokens }) => sum + tokens, 0)
    this.#tokens = known + UNKNOWN_TOKENS * (this.#keys.length - this.#items.length)
    this.#holdsBack = !namesReceiver(request)
  }

  /** @throws AdapterError when the part has failed, or the signal's reason */
  async run (): Promise<JsonAnswer> {
    const { stats, log } = this.#gateway
    const failed = new Set<string>()
    let last: AdapterError | undefined
    for (let attempt = 0; ; attempt++) {
      const node = this.#choose(failed)
      if (node === undefined) {
        await this.#noneLeft(last)
        failed.clear()
        continue
      }
      try {
        return await this.#attempt(node, attempt)
      } catch (err) {
        if (this.#signal.aborted || this.#part.hungUp || !AdapterError.is(err)) throw err
        last = err
        if (err.fault === 'client') this.#beBlank(err)
        else if (this.#part.pin !== undefined) throw this.#pushed(err)
        else {
          log.warn({ err, node: node.id, part: this.#part.id }, 'encode call of a language server failed; it moves to the next encoder')
          stats.encodeMoves++
          failed.add(node.id)
        }
      }
    }
  }

  #choose (failed: ReadonlySet<string>): NodeSnapshot | undefined {
    const { registry, options: { routing } } = this.#gateway
    const model = this.#caller?.model
    // An encoder does not say whose model's it is; the operator may.
    const fits = ({ models }: NodeSnapshot): boolean => models.length === 0 || model === undefined || models.includes(model)
    const encoders = usableOf(registry.snapshot().nodes.filter(node => node.info?.produces.includes(PUSHED) === true && fits(node)), 'encode', routing.panicThreshold)
    return byAffinity(this.#keys.join(), this.#tokens, encoders, routing.encoderTokens).find(({ id }) => !failed.has(id))
  }

  /** The client learns at once that no encoder is left. A language server that bears no error waits on. */
  async #noneLeft (last: AdapterError | undefined): Promise<void> {
    this.#caller?.refuse(exhaustedError({ last }))
    if (!this.#holdsBack) throw last ?? new AdapterError('UNAVAILABLE', 'no encoder is registered and well', { node: '' })
    await abortable(delay(AGAIN_MS), this.#signal)
  }

  #beBlank (err: AdapterError): void {
    const item = this.#items.length === this.#keys.length ? this.#items[0] : undefined
    const param = item === undefined ? undefined : item.path
    this.#caller?.refuse(epdError('EPD_ERR_INVALID_MEDIA', [`The encoder can not read ${param === undefined ? 'a picture of the request' : `the picture ${param}`}`], { param, cause: err }))
    // Without its client's request the language server would answer about a picture that no client has sent.
    if (!this.#holdsBack || this.#caller === undefined || this.#blank || this.#request.modality !== 'IMAGE' || this.#part.pin !== undefined) throw err
    this.#blank = true
  }

  /** The encoder lives and has pushed its error to the language server. */
  #pushed (err: AdapterError): AdapterError {
    this.#caller?.refuse(epdError('EPD_ERR_ENCODE_FAILED', [], { cause: err }))
    return err
  }

  async #attempt (node: NodeSnapshot, attempt: number): Promise<JsonAnswer> {
    const { registry, stats, options: { timeouts }, dispatcher, log } = this.#gateway
    const limit = new TimeLimit(timeouts.encode, this.#signal)
    const ticket = registry.acquire(node.id, 'encode', this.#tokens)
    const span = this.#caller?.span.begin(SPAN.encodeCall, { [ATTR.node]: node.id, [ATTR.items]: this.#keys.length, [ATTR.queueMs]: Math.round(performance.now() - this.#since) })
    // What is left of an attempt at the encoder must not be taken for another one's.
    const id = attempt === 0 ? this.#part.id : `${this.#part.id}.${attempt}`
    const call: Call = { signal: limit, headers: { ...span?.headers, [REQUEST_ID_HEADER]: id }, dispatcher, log }
    try {
      const { answer, tokens: count } = await this.#encodeAt(node, id, attempt, call, limit)
      const tokens = count()
      ticket.end()
      span?.set({ [ATTR.tokens]: tokens })
      span?.end()
      if (!this.#blank) {
        stats.encoded(node.id, this.#keys.length, 0)
        this.#caller?.encoded(this.#keys.length, tokens)
      }
      return answer
    } catch (err) {
      const failure = limit.timedOut ? new AdapterError('UNAVAILABLE', `${node.id} did not answer in time`, { node: node.id, cause: err, how: 'late' }) : err
      if (this.#signal.aborted) ticket.end(new DOMException('aborted', 'AbortError'))
      else ticket.end(failure, verdictOn(failure, 'encode'))
      span?.end(this.#signal.aborted ? { aborted: true } : { error: failure })
      throw failure
    } finally {
      // Ends what still waits at the encoder.
      limit.abort(new DOMException('The call is over', 'AbortError'))
    }
  }

  async #encodeAt (node: NodeSnapshot, id: string, attempt: number, call: Call, limit: TimeLimit): Promise<{ answer: JsonAnswer, tokens: () => number }> {
    const { req_id: _, mm_items: items, ...rest } = this.#request
    const body = attempt === 0 ? this.#bytes : jsonOf({ ...rest, req_id: id, mm_items: this.#blank ? items.map(() => BLANK) : items })
    if (!this.#holdsBack) {
      this.#caller?.placed(node.id, this.#items)
      let tokens = 0
      // For the trace only. It goes first: once the part is encoded, the encoder would wait 180 s for another one of this name, and not stop meanwhile.
      this.#askMeta(node, id, call).then(({ body }) => { tokens = numberOf(objectOf(body).embedding_len) ?? 0 }).catch(() => {})
      const encoding = callEncoder(node, '/encode', body, call)
      const answer = well(node, await encoding)
      this.#part.state = 'delivered'
      return { answer, tokens: () => tokens }
    }
    const encoding = callEncoder(node, '/encode', body, call)
    encoding.catch(() => {})
    const meta = await this.#preprocessed(node, id, encoding, call)
    const part = this.#part
    if (part.state === 'lost') {
      limit.restart(0)
      await abortable(part.group.othersSettled(part), this.#signal)
    }
    limit.restart(this.#gateway.options.timeouts.encode)
    this.#caller?.placed(node.id, this.#items)
    part.pin = { node, id }
    part.group.changed()
    try {
      const answer = well(node, await Promise.race([encoding, this.#passReceivers(node, id, call)]))
      part.state = 'delivered'
      part.group.changed()
      return { answer: withId(answer, part.id), tokens: () => numberOf(meta.embedding_len) ?? numberOf(objectOf(answer.body).embedding_len) ?? 0 }
    } catch (err) {
      // An encoder that answers lives, and pushes what it answers. One that broke off may have pushed the embeddings.
      if (!AdapterError.is(err) || err.cause !== undefined || limit.timedOut) {
        part.pin = undefined
        part.state = 'lost'
        part.group.changed()
      }
      throw err
    } finally {
      part.forward = undefined
    }
  }

  /** Resolves when the encoder has read the pictures: it knows their embeddings' sizes. No error has left it before. */
  async #preprocessed (node: NodeSnapshot, id: string, encoding: Promise<JsonAnswer>, call: Call): Promise<PartMeta> {
    const asking = this.#askMeta(node, id, call)
    asking.catch(() => {})
    const first = await Promise.race([asking.then(meta => ({ meta, answer: undefined })), encoding.then(answer => ({ meta: undefined, answer }))])
    // Mooncake's embeddings stay at the encoder until they are asked for.
    if (first.meta === undefined) return objectOf(well(node, first.answer).body)
    const { meta } = first
    if (meta.statusCode === 200) return objectOf(meta.body)
    // A version without this route can't be held back from.
    if (meta.statusCode === 404 || meta.statusCode === 405) return {}
    const own = await Promise.race([encoding, delay(ERROR_MS, meta)])
    throw encoderError(node, own.statusCode >= 300 ? own : meta)
  }

  async #askMeta (node: NodeSnapshot, id: string, call: Call): Promise<JsonAnswer> {
    return await callEncoder(node, '/scheduler_receive_meta_data', jsonOf({ req_id: id, part_idx: this.#request.part_idx }), call)
  }

  /** Names the receivers to the encoder, those to come too. Never resolves; rejects when the encoder takes one not. */
  #passReceivers (node: NodeSnapshot, id: string, call: Call): Promise<never> {
    return new Promise((_resolve, reject) => {
      const forward = (receiver: object): void => {
        callEncoder(node, '/scheduler_receive_url', jsonOf({ ...receiver, req_id: id }), call).then(answer => { well(node, answer) }).catch(reject)
      }
      for (const receiver of this.#part.receivers) forward(receiver)
      this.#part.forward = forward
    })
  }
}

/** Hashes of the pictures' URLs. */
export function pictureHashes ({ mm_items: items }: EncodeRequest): string[] {
  return items.map(item => createHash('sha256').update(urlOf(item)).digest('hex'))
}

function well (node: NodeSnapshot, answer: JsonAnswer): JsonAnswer {
  if (answer.statusCode >= 300) throw encoderError(node, answer)
  return answer
}

function jsonOf (value: unknown): Buffer {
  return Buffer.from(JSON.stringify(value))
}

/** The language server knows the part by its own name. */
export function withId (answer: JsonAnswer, id: string): JsonAnswer {
  const body = objectOf(answer.body)
  return body.req_id === undefined ? answer : { ...answer, body: { ...body, req_id: id } }
}
