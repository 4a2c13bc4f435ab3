/**
 * A stand-in for `lmdeploy serve api_server`, as a real HTTP server: it registers before it listens, answers engine_info
 * as a string that holds JSON (500 with TurboMind), drops pictures silently when started language-model-only,
 * hangs on a migration sent to a hybrid, closes idle connections after 5 s, and breaks in the ways a test asks for. What
 * it does as Prefill or Decode is in fake-distserve.ts.
 */
import { once } from 'node:events'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { ENDS_AT_ONCE, FakeDistServe, type DistServeBody, type DistServeOptions } from './fake-distserve.ts'
import { freePort } from './free-port.ts'

export interface FakeLmdeployOptions extends Partial<DistServeOptions> {
  readonly model?: string
  /** `old`: a version without /distserve. */
  readonly backend?: 'pytorch' | 'turbomind' | 'old'
  readonly languageModelOnly?: boolean
  readonly apiKey?: string
  readonly port?: number
  /** Host it registers with; LMDeploy's default is 0.0.0.0. */
  readonly serverName?: string
  readonly proxyUrl?: string
  /** What it says to everything. */
  readonly answer?: string
  readonly uvicornKeepAliveMs?: number
}

/** What the next generation request meets in place of an answer. */
export type Fault =
  | { readonly kind: 'reset' }
  | { readonly kind: 'silence' }
  | { readonly kind: 'head-then-silence' }
  | { readonly kind: 'head-then-reset' }
  | { readonly kind: 'half-event-then-silence' }
  | { readonly kind: 'half-event-then-reset' }
  | { readonly kind: 'event-then-reset' }
  | { readonly kind: 'empty-stream' }
  | { readonly kind: 'error-event', readonly error: object }
  | { readonly kind: 'split', readonly bytes: number }
  | { readonly kind: 'status', readonly status: number, readonly body?: unknown, readonly headers?: Record<string, string> }

export interface SeenRequest {
  readonly method: string
  readonly path: string
  readonly headers: IncomingMessage['headers']
  readonly body: Record<string, unknown> | undefined
  /** Resolves when the connection is gone before the answer was complete. */
  aborted: boolean
}

type Content = string | Array<{ type: string, text?: string }>
interface ChatBody extends DistServeBody {
  readonly model?: string
  readonly stream?: boolean
  readonly max_tokens?: number
  readonly messages?: Array<{ role: string, content: Content }>
  readonly prompt?: unknown
}

const MEDIA = new Set(['image_url', 'image_data', 'image', 'video_url', 'video', 'audio_url', 'audio', 'time_series_url', 'time_series'])
const TOKENS_PER_IMAGE = 256

export class FakeLmdeploy {
  readonly options: FakeLmdeployOptions
  readonly seen: SeenRequest[] = []
  readonly faults: Fault[] = []
  readonly distserve: FakeDistServe
  health: 'healthy' | 'sleeping' | 'initializing' | 'unhealthy' | 'constructor' = 'healthy'
  numGpuBlocks = 1234
  #server: Server | undefined
  #sockets = new Set<Socket>()
  #port = 0

  constructor (options: FakeLmdeployOptions = {}) {
    this.options = options
    this.distserve = new FakeDistServe({ ...options, role: options.role ?? 1 })
  }

  static async start (options: FakeLmdeployOptions = {}): Promise<FakeLmdeploy> {
    const fake = new FakeLmdeploy(options)
    await fake.comeBack()
    return fake
  }

  get model (): string { return this.options.model ?? 'internvl3' }
  get port (): number { return this.#port }
  /** As it registers: its engine id. */
  get url (): string { return `http://${this.options.serverName ?? '127.0.0.1'}:${this.#port}` }
  get connections (): number { return this.#sockets.size }

  generations (): SeenRequest[] {
    return this.seen.filter(request => request.method === 'POST' && request.path.startsWith('/v1/') && !isVisionCheck(request))
  }

  /** Requests that had their KV blocks kept. */
  prefills (): SeenRequest[] {
    return this.generations().filter(request => request.body?.preserve_cache === true && !isNamingCheck(request))
  }

  /** Starts, or starts again at the same port. Registers first, as LMDeploy does: the server does not listen yet while the proxy answers. */
  async comeBack (): Promise<void> {
    if (this.#port === 0) this.#port = this.options.port ?? await freePort()
    if (this.options.proxyUrl !== undefined) await this.register(this.options.proxyUrl)
    const server = createServer((request, response) => { this.#serve(request, response).catch(() => { response.destroy() }) })
    server.keepAliveTimeout = this.options.uvicornKeepAliveMs ?? 5000
    server.on('connection', socket => {
      this.#sockets.add(socket)
      socket.on('close', () => { this.#sockets.delete(socket) })
      socket.on('error', () => {})
    })
    server.listen(this.#port, '127.0.0.1')
    await once(server, 'listening')
    this.#server = server
  }

  /** POST /nodes/add; only the status counts, and a failure is logged and never retried. Returns the answer. */
  async register (proxyUrl: string): Promise<{ status: number, body: unknown }> {
    const response = await fetch(`${proxyUrl}/nodes/add`, {
      method: 'POST',
      headers: { accept: 'application/json', 'content-type': 'application/json' },
      body: JSON.stringify({ url: this.url, status: { models: [this.model], role: this.options.backend === 'turbomind' ? 1 : this.options.role ?? 1 } })
    })
    return { status: response.status, body: await response.json() }
  }

  /** As kill -9: connections break, the port refuses. */
  async vanish (): Promise<void> {
    const server = this.#server
    if (server === undefined) return
    this.#server = undefined
    this.distserve.forget()
    for (const socket of this.#sockets) socket.resetAndDestroy()
    server.close()
    await once(server, 'close')
  }

  async close (): Promise<void> {
    await this.vanish()
  }

  async #serve (request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk as Buffer)
    const text = Buffer.concat(chunks).toString()
    const seen: SeenRequest = { method: request.method!, path: request.url!, headers: request.headers, body: text === '' ? undefined : JSON.parse(text) as Record<string, unknown>, aborted: false }
    this.seen.push(seen)
    response.on('close', () => { seen.aborted = !response.writableFinished })
    const { apiKey } = this.options
    if (apiKey !== undefined && seen.path !== '/health' && request.headers.authorization !== `Bearer ${apiKey}`) {
      json(response, 401, errorResponse(401, 'Unauthorized', 'authentication_error'))
      return
    }
    const route = `${seen.method} ${seen.path.split('?')[0]}`
    if (route === 'GET /health') this.#health(response)
    else if (route === 'GET /v1/models') json(response, 200, { object: 'list', data: [{ id: this.model, object: 'model', created: 0, owned_by: 'lmdeploy', root: this.model, parent: null }] })
    else if (route === 'GET /distserve/engine_info') this.#engineInfo(response)
    else if (route === 'POST /v1/chat/completions' || route === 'POST /v1/completions') await this.#generate(seen, response)
    else if (route === 'POST /abort_request') json(response, 501, errorResponse(501, 'abort handling is not enabled', 'not_implemented'))
    else this.#control(seen, response)
  }

  #control ({ path, body }: SeenRequest, response: ServerResponse): void {
    const answer = this.distserve.control(path, body, this.#port) ?? { status: 404, body: { detail: 'Not Found' } }
    json(response, answer.status, answer.body)
  }

  #health (response: ServerResponse): void {
    json(response, this.health === 'healthy' || this.health === 'sleeping' ? 200 : 503, { status: this.health, message: this.health === 'unhealthy' ? 'scheduler tick stalled' : '' })
  }

  #engineInfo (response: ServerResponse): void {
    const { backend = 'pytorch' } = this.options
    if (backend === 'turbomind') { response.writeHead(500, { 'content-type': 'text/plain' }).end('Internal Server Error'); return }
    if (backend === 'old') { json(response, 404, { detail: 'Not Found' }); return }
    json(response, 200, JSON.stringify(this.distserve.info(this.numGpuBlocks)))
  }

  async #generate (seen: SeenRequest, response: ServerResponse): Promise<void> {
    const body = seen.body as ChatBody
    if (this.health === 'sleeping') { json(response, 503, errorResponse(503, 'Engine is sleeping; call POST /wakeup', 'engine_unavailable')); return }
    const { role = 1 } = this.options
    const gated = this.distserve.gate(body, seen.headers['x-lmdeploy-distserve-proxy'] === '1')
    if (gated !== undefined) { json(response, 400, errorResponse(400, gated, 'invalid_request_error')); return }
    if (body.migration_request !== undefined && role === 1) return
    const fault = isVisionCheck(seen) ? undefined : this.faults.shift()
    if (fault !== undefined && fault.kind !== 'split') { misbehave(fault, response, body, this); return }
    if (body.model !== this.model) { json(response, 404, errorResponse(404, `The model '${body.model}' does not exist.`, 'not_found_error')); return }
    const wrong = this.#wrongPart(body)
    if (wrong !== undefined) { json(response, 400, errorResponse(400, `unknown item type ${wrong}`, 'invalid_request_error')); return }
    if (role === 2) { this.#prefill(seen.path, body, response); return }
    if (body.migration_request !== undefined && !(await this.distserve.migrate(body.migration_request))) { response.socket?.resetAndDestroy(); return }
    if (body.stream === true) this.#stream(body, response, fault?.bytes)
    else this.#answer(body, response, {})
  }

  #answer (body: ChatBody, response: ServerResponse, extras: Record<string, unknown>): void {
    json(response, 200, { id: 'chatcmpl-x', object: 'chat.completion', model: this.model, choices: [{ index: 0, message: { role: 'assistant', content: this.says(body) }, finish_reason: 'stop' }], usage: this.#usage(body), ...extras })
  }

  #prefill (path: string, body: ChatBody, response: ServerResponse): void {
    const prompt = JSON.stringify(body.messages ?? body.prompt)
    const done = this.distserve.prefill(body, path, prompt)
    if (done === 'stalls') return
    if (done === 'fails') response.writeHead(500, { 'content-type': 'text/plain' }).end('Internal Server Error')
    else if (done === 'occupied') json(response, 400, errorResponse(400, `The session_id ${body.session_id} is occupied.`, 'invalid_request_error'))
    else this.#answer(body, response, done.extras)
  }

  /** Reports how many pictures reached the model. */
  says (body: ChatBody): string {
    if (JSON.stringify(body.messages ?? body.prompt).includes(ENDS_AT_ONCE)) return ''
    return this.options.answer ?? `I see ${this.#pictures(body)} pictures.`
  }

  events (body: ChatBody): string[] {
    const chunk = (delta: object, finish: string | null): string =>
      `data: ${JSON.stringify({ id: 'chatcmpl-x', object: 'chat.completion.chunk', model: this.model, choices: [{ index: 0, delta, finish_reason: finish }] })}\n\n`
    const words = this.says(body).split(' ').map((word, i) => chunk({ content: i === 0 ? word : ` ${word}` }, null))
    return [chunk({ role: 'assistant', content: '' }, null), ...words, chunk({}, 'stop'), 'data: [DONE]\n\n']
  }

  #stream (body: ChatBody, response: ServerResponse, bytes: number | undefined): void {
    response.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8' })
    if (bytes === undefined) {
      for (const event of this.events(body)) response.write(event)
      response.end()
      return
    }
    const all = Buffer.from(this.events(body).join(''))
    const next = (at: number): void => {
      if (at >= all.length) { response.end(); return }
      response.write(all.subarray(at, at + bytes), () => { setImmediate(next, at + bytes) })
    }
    next(0)
  }

  #parts (body: ChatBody): Array<{ type: string }> {
    return (body.messages ?? []).flatMap(message => Array.isArray(message.content) ? message.content : [])
  }

  #wrongPart (body: ChatBody): string | undefined {
    return this.#parts(body).find(part => part.type !== 'text' && !MEDIA.has(part.type))?.type
  }

  #pictures (body: ChatBody): number {
    return this.options.languageModelOnly === true ? 0 : this.#parts(body).filter(part => MEDIA.has(part.type)).length
  }

  #usage (body: ChatBody): object {
    const prompt = 12 + TOKENS_PER_IMAGE * this.#pictures(body)
    return { prompt_tokens: prompt, completion_tokens: 4, total_tokens: prompt + 4 }
  }
}

/** The gateway's own question whether the server looks at pictures. */
function isVisionCheck (request: SeenRequest): boolean {
  const body = request.body as ChatBody | undefined
  return body?.max_tokens === 1 && JSON.stringify(body.messages ?? null).includes('"text":"Hi"')
}

/** The adapter's question how this server names its sessions. */
function isNamingCheck ({ body }: SeenRequest): boolean {
  return body?.preserve_cache === true && JSON.stringify(body.messages) === '[{"role":"user","content":"Hi"}]'
}

function misbehave (fault: Fault, response: ServerResponse, body: ChatBody, fake: FakeLmdeploy): void {
  const { socket } = response
  const reset = (): void => { setImmediate(() => socket?.resetAndDestroy()) }
  const start = (text: string, then?: () => void): void => {
    response.writeHead(200, { 'content-type': body.stream === true ? 'text/event-stream' : 'application/json' })
    response.flushHeaders()
    if (text === '') then?.()
    else response.write(text, () => { then?.() })
  }
  const first = fake.events(body)[0]!
  switch (fault.kind) {
    case 'reset': socket?.resetAndDestroy(); break
    case 'silence': break
    case 'head-then-silence': start(''); break
    case 'head-then-reset': start('', () => { setTimeout(reset, 20) }); break
    case 'half-event-then-silence': start(first.slice(0, first.length >> 1)); break
    case 'half-event-then-reset': start(first.slice(0, first.length >> 1), () => { setTimeout(reset, 20) }); break
    case 'event-then-reset': start(first, () => { setTimeout(reset, 20) }); break
    case 'empty-stream': start('', () => { response.end() }); break
    case 'error-event': start(`data: ${JSON.stringify({ error: fault.error })}\n\ndata: [DONE]\n\n`, () => { response.end() }); break
    case 'status': json(response, fault.status, fault.body ?? errorResponse(fault.status, 'scripted', 'scripted'), fault.headers); break
    case 'split': break
  }
}

/** LMDeploy's ErrorResponse. */
function errorResponse (code: number, message: string, type: string): object {
  return { object: 'error', message, type, code, param: null }
}

function json (response: ServerResponse, status: number, body: unknown, headers: Record<string, string> = {}): void {
  response.writeHead(status, { 'content-type': 'application/json', ...headers }).end(JSON.stringify(body))
}
