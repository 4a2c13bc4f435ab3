/**
 * SGLang 0.5.23's control plane over real sockets: encoders and a language server that calls them, with the answers
 * recorded from the real ones (test/fixtures/sglang). Embeddings go from encoder to language server by HTTP here, in
 * place of ZeroMQ. A language server dies of what kills the real one.
 */
import { createHash, randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo, Socket } from 'node:net'
import { join } from 'node:path'
import type { Test } from 'tap'
import { packageRoot } from './package-root.ts'

/** What is read of a request. */
interface ChatMessage { readonly content: string | ReadonlyArray<{ readonly image_url?: { readonly url: string } }> }

export interface Exchange { readonly name: string, readonly method: string, readonly path: string, readonly request?: any, readonly headers?: Record<string, string>, readonly status: number, readonly type: string | null, readonly answer: any }

/** What the real servers said, shortened; test/fixtures/sglang/README.md says how it was recorded. */
export const RECORDED: readonly Exchange[] = JSON.parse(readFileSync(join(packageRoot(), 'test/fixtures/sglang/exchanges.json'), 'utf8'))

export function recorded (name: string): Exchange {
  const found = RECORDED.find(exchange => exchange.name === name)
  if (found === undefined) throw new Error(`nothing recorded as ${name}`)
  return found
}

interface Call { readonly method: string, readonly path: string, readonly headers: IncomingMessage['headers'], readonly body: any }

/** An HTTP server that can be killed and started again at its port. */
abstract class FakeServer {
  readonly seen: Call[] = []
  #server: Server | undefined
  readonly #sockets = new Set<Socket>()
  #port = 0
  /** Ends the calls that this process makes. */
  #life = new AbortController()

  get url (): string { return `http://127.0.0.1:${this.#port}` }
  get alive (): boolean { return this.#server !== undefined }
  calls (path: string): Call[] { return this.seen.filter(call => call.path === path) }

  async listen (): Promise<void> {
    const server = createServer((request, response) => { this.#serve(request, response).catch(() => { response.destroy() }) })
    server.on('connection', socket => {
      this.#sockets.add(socket)
      socket.on('close', () => { this.#sockets.delete(socket) }).on('error', () => {})
    })
    server.listen(this.#port, '127.0.0.1')
    await once(server, 'listening')
    this.#port = (server.address() as AddressInfo).port
    this.#server = server
    this.#life = new AbortController()
  }

  protected async post (url: string, body: object, signal?: AbortSignal): Promise<Response> {
    return await fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), signal: signal === undefined ? this.#life.signal : AbortSignal.any([signal, this.#life.signal]) })
  }

  /** As kill -9. */
  async kill (): Promise<void> {
    const server = this.#server
    if (server === undefined) return
    this.#server = undefined
    this.#life.abort()
    for (const socket of this.#sockets) socket.resetAndDestroy()
    server.close()
    await once(server, 'close')
  }

  async #serve (request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk as Buffer)
    const text = Buffer.concat(chunks).toString()
    const call = { method: request.method!, path: request.url!, headers: request.headers, body: text === '' ? undefined : JSON.parse(text) }
    if (call.path !== '/health') this.seen.push(call)
    await this.serve(call, response)
  }

  protected abstract serve (call: Call, response: ServerResponse): Promise<void>
}

function send (response: ServerResponse, status: number, body: unknown): void {
  response.writeHead(status, { 'content-type': 'application/json' }).end(body === undefined ? undefined : JSON.stringify(body))
}

/** Answers as recorded, with some members of another request. */
function replay (response: ServerResponse, name: string, members: object = {}): void {
  const { status, answer } = recorded(name)
  send(response, status, typeof answer === 'object' && answer !== null ? { ...answer, ...members } : answer)
}

/**
 * What the next encode meets. `reset`: the connection breaks at once. `busy`: 503. `bad`: the pictures can't be decoded.
 * `silent`: nothing comes. `dies`: the process dies once the receive URL is known, before it pushes. `delivered`: it dies
 * when it has pushed. `vit`: the forward pass fails after preprocessing. `hold`: preprocessing waits. `late`: the answer does, after the push.
 */
export type EncodeFault = 'reset' | 'busy' | 'bad' | 'silent' | 'dies' | 'delivered' | 'vit' | { readonly hold: Promise<void> } | { readonly late: Promise<void> }

interface Push { readonly req_id: string, readonly part_idx: number, readonly num_parts: number, readonly pictures?: readonly string[], readonly error_msg?: string, readonly error_code?: number }

class Deferred<T> {
  readonly promise: Promise<T>
  resolve!: (value: T) => void
  constructor () { this.promise = new Promise(resolve => { this.resolve = resolve }) }
}

/** One request on an encoder: receive URLs and metadata, which may be asked for before it. */
class Encoding {
  readonly started = new Deferred<void>()
  readonly receivers = new Deferred<string[]>()
  readonly meta = new Deferred<{ tokens: number } | { error: string }>()
  readonly urls: string[] = []
}

export class FakeSglangEncoder extends FakeServer {
  readonly faults: EncodeFault[] = []
  healthy = true
  /** Embeddings stay here until POST /send asks for them, as with `--encoder-transfer-backend mooncake`. */
  mooncake = false
  readonly #encodings = new Map<string, Encoding>()

  static async start (t: Pick<Test, 'teardown'>): Promise<FakeSglangEncoder> {
    const encoder = new FakeSglangEncoder()
    await encoder.listen()
    t.teardown(async () => { await encoder.kill() })
    return encoder
  }

  get spec (): { url: string, role: 'encoder', adapter: 'sglang' } { return { url: this.url, role: 'encoder', adapter: 'sglang' } }

  /** As its process does at the start. */
  async register (gateway: string): Promise<Response> {
    return await fetch(`${gateway}/register_encoder_url`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ url: this.url }) })
  }

  protected async serve (call: Call, response: ServerResponse): Promise<void> {
    switch (`${call.method} ${call.path}`) {
      case 'GET /health': response.writeHead(this.healthy ? 200 : 503).end(); return
      case 'POST /encode': await this.#encode(call.body, response); return
      case 'POST /scheduler_receive_url': await this.#receiver(call.body, response); return
      case 'POST /send': this.#send(call.body, response); return
      case 'POST /scheduler_receive_meta_data': await this.#meta(call.body, response); return
      default: send(response, 404, { detail: 'Not Found' })
    }
  }

  #encoding (id: string): Encoding {
    let encoding = this.#encodings.get(id)
    if (encoding === undefined) this.#encodings.set(id, encoding = new Encoding())
    return encoding
  }

  async #encode (body: any, response: ServerResponse): Promise<void> {
    const { req_id: id, mm_items: items } = body
    if (typeof id !== 'string') { replay(response, 'encode without req_id'); return }
    if (!Array.isArray(items) || items.length === 0) { replay(response, 'encode without mm_items', { req_id: id }); return }
    const fault = this.faults.shift()
    if (fault === 'reset') { response.socket?.resetAndDestroy(); return }
    if (fault === 'busy') { send(response, 503, { status: 'error', message: 'all DP workers are dead', req_id: id }); return }
    if (fault === 'silent') return
    const encoding = this.#encoding(id)
    encoding.started.resolve()
    if (typeof fault === 'object' && 'hold' in fault) await fault.hold
    const urls = (items as Array<string | { url: string }>).map(item => typeof item === 'string' ? item : item.url)
    const { message } = recorded('encode of a bad picture').answer as { message: string }
    const bad = fault === 'bad' || urls.some(url => url.startsWith('data:') && pictureOf(url) === undefined)
    if (bad) { await this.#fail(encoding, body, response, 400, message); return }
    encoding.meta.resolve({ tokens: 4 * urls.length })
    if (fault === 'vit') { await encoding.receivers.promise; await this.#fail(encoding, body, response, 500, 'CUDA out of memory'); return }
    if (this.mooncake) { send(response, 200, { ...body, mm_items: undefined, embedding_size: 2048, embedding_len: 4 * urls.length, embedding_dim: 256 }); return }
    if (body.embedding_port === null) await encoding.receivers.promise
    if (fault === 'dies') { await this.kill(); return }
    await this.#push(encoding, body, { pictures: urls.map(url => pictureOf(url) ?? url) })
    if (fault === 'delivered') { await this.kill(); return }
    this.#encodings.delete(id)
    if (typeof fault === 'object' && 'late' in fault) await fault.late
    replay(response, 'encode')
  }

  /** The answer comes at once; the error is pushed as soon as a receiver is known. */
  async #fail (encoding: Encoding, body: any, response: ServerResponse, status: number, message: string): Promise<void> {
    encoding.meta.resolve({ error: message })
    send(response, status, { status: 'error', message, req_id: body.req_id })
    if (body.embedding_port === null) await encoding.receivers.promise
    await this.#push(encoding, body, { error_msg: message, error_code: status })
  }

  async #push ({ urls }: Encoding, body: any, what: Partial<Push>): Promise<void> {
    const targets = body.embedding_port === null ? urls : [`${body.prefill_host}:${body.embedding_port}`]
    const push: Push = { req_id: body.req_id, part_idx: body.part_idx, num_parts: body.num_parts, ...what }
    await Promise.allSettled(targets.map(async target => await this.post(`http://${target}/embedding`, push)))
  }

  #send ({ req_id: id }: any, response: ServerResponse): void {
    if (this.#encodings.delete(id)) send(response, 200, null)
    else send(response, 500, { status: 'error', message: `no staged embedding for req_id=${id} (already released)`, req_id: id })
  }

  async #receiver ({ req_id: id, receive_count: count, receive_url: url }: any, response: ServerResponse): Promise<void> {
    const encoding = this.#encoding(id)
    await encoding.started.promise
    encoding.urls.push(url)
    if (encoding.urls.length === count) encoding.receivers.resolve(encoding.urls)
    replay(response, 'scheduler_receive_url')
  }

  async #meta ({ req_id: id, part_idx: part }: any, response: ServerResponse): Promise<void> {
    const meta = await this.#encoding(id).meta.promise
    if ('error' in meta) send(response, 500, { status: 'error', message: meta.error, req_id: id })
    else replay(response, 'scheduler_receive_meta_data', { req_id: id, part_idx: part, embedding_len: meta.tokens })
  }
}

/** Stands for the picture's embedding: any other picture gives another text. Undefined when its base64 is no PNG of ours. */
function pictureOf (url: string): string | undefined {
  const base64 = url.slice(url.indexOf(',') + 1)
  return base64.length < 16 ? undefined : createHash('sha256').update(base64).digest('hex').slice(0, 8)
}

export interface FakeLmOptions {
  readonly transfer?: 'zmq_to_scheduler' | 'zmq_to_tokenizer'
  readonly model?: string
  /** `--encoder-urls` */
  readonly encoderUrls?: readonly string[]
  readonly languageOnly?: boolean
  /** `--disaggregation-mode` */
  readonly mode?: 'prefill' | 'decode'
  /** `--disaggregation-transfer-backend` */
  readonly kvTransfer?: string
}

interface Waiting { readonly parts: Array<readonly string[] | undefined>, count: number, done (): void, fail (why: string): void }

/** A language server. With zmq_to_scheduler it dies, as 0.5.23 does, of a failed picture and of a client that leaves too early. */
export class FakeSglangLm extends FakeServer {
  readonly options: FakeLmOptions
  readonly encoderUrls: string[]
  /** Why the process ended. */
  died: string | undefined
  /** Holds every answer back until it resolves, embeddings or not. */
  hold: Promise<void> | undefined
  readonly answered: string[] = []
  /** Of prefills: resolves when a decode server has come for the KV blocks. */
  readonly #rooms = new Map<number, { readonly text: string, taken (): void }>()
  /** Status with which every chat is answered, in place of an answer. */
  fails: number | undefined
  #onClose: Array<() => void> = []
  readonly #waiting = new Map<string, Waiting>()

  constructor (options: FakeLmOptions) {
    super()
    this.options = options
    this.encoderUrls = [...options.encoderUrls ?? []]
  }

  static async start (t: Pick<Test, 'teardown'>, options: FakeLmOptions = {}): Promise<FakeSglangLm> {
    const lm = new FakeSglangLm(options)
    await lm.listen()
    t.teardown(async () => { await lm.kill() })
    return lm
  }

  /** The pictures of most tests can't be decoded. */
  get spec (): { url: string, adapter: 'sglang', checkMedia: false } { return { url: this.url, adapter: 'sglang', checkMedia: false } }
  get generations (): Call[] { return this.calls('/v1/chat/completions') }
  /** Requests that wait for embeddings. */
  get waiting (): number { return this.#waiting.size }
  /** Resolves when the next chat request is cut off or ends. */
  async nextClose (): Promise<void> { await new Promise<void>(resolve => { this.#onClose.push(resolve) }) }

  get #fragile (): boolean { return this.options.transfer !== 'zmq_to_tokenizer' }

  protected async serve (call: Call, response: ServerResponse): Promise<void> {
    const { model = 'tiny', languageOnly = true, transfer = 'zmq_to_scheduler', mode = 'null', kvTransfer = 'mooncake' } = this.options
    switch (call.path) {
      case '/health': response.writeHead(200).end(); return
      case '/v1/models': send(response, 200, { object: 'list', data: [{ ...recorded('models').answer.data[0], id: model }] }); return
      case '/model_info': replay(response, 'model_info'); return
      case '/server_info': replay(response, 'server_info', { encoder_urls: this.encoderUrls, language_only: languageOnly, encoder_transfer_backend: transfer, disaggregation_mode: mode, disaggregation_bootstrap_port: Number(new URL(this.url).port), disaggregation_transfer_backend: kvTransfer }); return
      case '/room': this.#room(call.body.room, response); return
      case '/embedding': this.#embedding(call.body); response.writeHead(200).end(); return
      case '/v1/chat/completions': await this.#chat(call.body, response); return
      default: send(response, 404, { detail: 'Not Found' })
    }
  }

  #die (why: string): void {
    this.died ??= why
    this.kill().catch(() => {})
  }

  async #chat (body: any, response: ServerResponse): Promise<void> {
    const urls = (body.messages as ChatMessage[]).flatMap(({ content }) => Array.isArray(content) ? content : []).flatMap(({ image_url: image }) => image === undefined ? [] : [image.url])
    if (this.fails !== undefined) { send(response, this.fails, { object: 'error', message: 'scripted', type: 'x', param: null, code: this.fails }); return }
    if (this.options.mode === 'decode') { await this.#decode(body, response); return }
    const id: string = body.rid ?? randomUUID().replaceAll('-', '')
    let waits = true
    response.on('close', () => { for (const resolve of this.#onClose.splice(0)) resolve() })
    response.on('close', () => { if (waits && urls.length > 0 && this.#fragile) this.#die("Aborted by user: TypeError: object of type 'NoneType' has no len()") })
    let pictures: readonly string[] = []
    if (urls.length > 0 && this.options.languageOnly !== false && this.encoderUrls.length > 0) {
      const found = await this.#encode(this.#fragile ? id : randomUUID().replaceAll('-', ''), urls)
      if (found === undefined) {
        waits = false
        const { status, answer } = recorded('chat without embeddings, zmq_to_tokenizer')
        send(response, status, answer)
        return
      }
      pictures = found
    }
    if (!this.alive) return
    waits = false
    await this.hold
    if (this.options.mode === 'prefill') await new Promise<void>(resolve => { this.#rooms.set(body.bootstrap_room, { text: `saw ${pictures.join(' ')}`, taken: resolve }) })
    this.answered.push(id)
    this.#answer(body, id, `saw ${pictures.join(' ')}`, response)
  }

  #room (room: number, response: ServerResponse): void {
    const found = this.#rooms.get(room)
    if (found === undefined) { send(response, 404, {}); return }
    this.#rooms.delete(room)
    send(response, 200, { text: found.text })
    found.taken()
  }

  /** As D: asks P until it has the KV blocks. */
  async #decode (body: any, response: ServerResponse): Promise<void> {
    while (!response.closed && this.alive) {
      const answer = await this.post(`http://${body.bootstrap_host}:${body.bootstrap_port}/room`, { room: body.bootstrap_room }).catch(() => undefined)
      if (answer?.status === 200) { this.#answer(body, body.rid, ((await answer.json()) as { text: string }).text, response); return }
      await new Promise(resolve => { setTimeout(resolve, 5) })
    }
  }

  #answer (body: any, id: string, text: string, response: ServerResponse): void {
    if (body.stream === true) {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      response.end(`data: ${JSON.stringify({ id, object: 'chat.completion.chunk', created: 1, model: body.model, choices: [{ index: 0, delta: { role: 'assistant', content: text }, finish_reason: null }] })}\n\ndata: [DONE]\n\n`)
      return
    }
    const { answer } = recorded('chat')
    send(response, 200, { ...answer, id, model: body.model, choices: [{ ...answer.choices[0], message: { ...answer.choices[0].message, content: text } }] })
  }

  /** As 0.5.23: contiguous runs of items, one part an encoder, a random choice of encoders. Undefined when it failed and the server lives. */
  async #encode (id: string, urls: readonly string[]): Promise<readonly string[] | undefined> {
    const encoders = this.encoderUrls.length
    const offset = Math.floor(Math.random() * encoders)
    const counts = Array.from({ length: encoders }, (_, i) => Math.floor(urls.length / encoders) + ((i - offset + encoders) % encoders < urls.length % encoders ? 1 : 0))
    const used = counts.flatMap((count, i) => count > 0 ? [i] : [])
    const { host } = new URL(this.url)
    const [hostname, port] = host.split(':') as [string, string]
    return await new Promise(resolve => {
      let settled = false
      const calls = new AbortController()
      const settle = (value: readonly string[] | undefined): void => {
        settled = true
        this.#waiting.delete(id)
        // With zmq_to_tokenizer it closes the calls that are not answered yet.
        if (!this.#fragile) calls.abort()
        resolve(value)
      }
      const waiting: Waiting = {
        parts: used.map(() => undefined),
        count: used.length,
        done: () => { settle(waiting.parts.flatMap(part => part ?? [])) },
        fail: why => {
          if (settled) return
          if (this.#fragile) this.#die(why)
          settle(undefined)
        }
      }
      this.#waiting.set(id, waiting)
      let from = 0
      for (const [part, encoder] of used.entries()) {
        const items = urls.slice(from, from += counts[encoder]!)
        const url = this.encoderUrls[encoder]!
        const name = `${id}_local_part_${part}`
        const encode = { ...recorded('encode').request, encoder_idx: encoder, encoder_url: url, mm_items: items, num_parts: used.length, part_idx: part, req_id: name, prefill_host: hostname, embedding_port: this.#fragile ? null : Number(port) }
        this.#call(`${url}/encode`, encode, calls.signal).catch((error: Error) => { waiting.fail(error.message) })
        if (this.#fragile) {
          const receiver = { ...recorded('scheduler_receive_url').request, req_id: name, receive_count: 1, receive_url: host }
          this.#call(`${url}/scheduler_receive_url`, receiver).catch((error: Error) => { waiting.fail(`Failed to register receive URL with encoder: ${error.message}`) })
        }
      }
    })
  }

  async #call (url: string, body: object, signal?: AbortSignal): Promise<void> {
    const answer = await this.post(url, body, signal)
    const text = await answer.text()
    if (answer.status >= 400) throw new Error(`${answer.status} ${text}`)
  }

  #embedding ({ req_id: part, part_idx: index, pictures, error_msg: error }: Push): void {
    const waiting = this.#waiting.get(part.replace(/_local_part_(?!.*_local_part_).*$/, ''))
    // Of a request that is not active any more: dropped.
    if (waiting === undefined) return
    if (error !== undefined) waiting.fail(error)
    else if (waiting.parts[index] !== undefined) waiting.fail(`duplicate embedding part ${index}`)
    else {
      waiting.parts[index] = pictures!
      if (--waiting.count === 0) waiting.done()
    }
  }
}
