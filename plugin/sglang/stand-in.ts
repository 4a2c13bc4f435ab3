import { abortable, TimeLimit } from '../../adapters/abort.ts'
import { AdapterError } from '../../adapters/adapter.ts'
import type { JsonAnswer } from '../../adapters/http/json.ts'
import { callEncoder, namesReceiver, type EncodeRequest, type ReceiverRequest } from '../../adapters/sglang/encoder.ts'
import { epdError } from '../errors.ts'
import type { Gateway } from '../gateway.ts'
import { PartEncoding, withId } from './encode.ts'
import { Parts } from './parts.ts'

/** A language server gives up after 180 s; what comes later is of no use, in milliseconds. */
const PATIENCE_MS = 170_000

/** What a call about a part needs of the one who calls. */
export type OnGone = (listener: () => void) => void

/**
 * Stands in for encoders before SGLang's language servers. Which of its addresses a call comes to makes no difference: a
 * language server spreads its pictures over the addresses, and the gateway over the encoders.
 */
export class StandIn {
  readonly #gateway: Gateway
  readonly #parts = new Parts()

  constructor (gateway: Gateway) {
    this.#gateway = gateway
  }

  /** Requests at language servers that wait for some part. */
  get waiting (): number {
    return this.#parts.size
  }

  /** POST /encode. Resolves with the encoder's answer when it has pushed the embeddings; mooncake's keep them until asked. */
  async encode (request: EncodeRequest, bytes: Buffer, onGone: OnGone): Promise<JsonAnswer> {
    const part = this.#parts.get(request.req_id)
    if (part.state !== 'new') throw new AdapterError('REJECTED', `the part ${request.req_id} is encoded already`, { node: '' })
    part.state = 'encoding'
    part.group.total = request.num_parts
    // A language server that is its own receiver hangs up when it has the embeddings, before the encoder answers at times.
    const onLeft: OnGone = listener => { onGone(() => { part.hungUp = true; if (!namesReceiver(request)) listener() }) }
    const answer = await this.#within(onLeft, signal => new PartEncoding(this.#gateway, part, request, bytes, signal).run())
    // Mooncake's receivers ask for the embeddings later.
    if (part.group.delivered && answer.body === null) this.#parts.delete(part)
    return answer
  }

  /** POST /scheduler_receive_url. A language server's scheduler stands still until it is answered, so nothing is waited for. */
  receive (receiver: ReceiverRequest): void {
    this.#parts.get(receiver.req_id).receive(receiver)
  }

  /** POST /scheduler_receive_meta_data and POST /send: to the encoder that has the part, as soon as one has. */
  async ask (path: '/scheduler_receive_meta_data' | '/send', request: { readonly req_id: string }, onGone: OnGone): Promise<JsonAnswer> {
    const part = this.#parts.get(request.req_id)
    return await this.#within(onGone, async signal => {
      await abortable(part.group.when(() => part.pin !== undefined), signal)
      const { node, id } = part.pin!
      const call = { signal, headers: {}, dispatcher: this.#gateway.dispatcher, log: this.#gateway.log }
      return withId(await callEncoder(node, path, Buffer.from(JSON.stringify({ ...request, req_id: id })), call), part.id)
    })
  }

  /** Ends with the one who called, with the gateway, and in time. */
  async #within<T> (onGone: OnGone, work: (signal: TimeLimit) => Promise<T>): Promise<T> {
    const { requests } = this.#gateway
    const signal = new TimeLimit(PATIENCE_MS)
    const inFlight = { cancel: (reason: unknown) => { signal.abort(reason) } }
    requests.add(inFlight)
    onGone(() => { signal.abort(epdError('EPD_ERR_CLIENT_CLOSED_REQUEST')) })
    try {
      return await work(signal)
    } finally {
      signal.clear()
      requests.delete(inFlight)
    }
  }
}
