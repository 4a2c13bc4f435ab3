/** A small stand-in for vLLM servers with the file connector and NIXL: what they answer, what they believe, and what ends them. */
import { createHash, randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { freePort } from '../helper/free-port.ts'

interface Part { readonly type?: string, readonly uuid?: string, readonly [member: string]: unknown }
export interface SeenBody {
  readonly model: string
  readonly stream?: boolean
  readonly max_tokens?: number
  readonly messages: ReadonlyArray<{ readonly role: string, readonly content: string | Part[] }>
  readonly ec_transfer_params?: Record<string, unknown>
  readonly kv_transfer_params?: Record<string, unknown>
  readonly [member: string]: unknown
}

export interface SmallVllmOptions {
  readonly role?: 'plain' | 'e' | 'pd' | 'p' | 'd'
  readonly model?: string
  /** The folder that E and PD share: content by key. */
  readonly files?: Map<string, string>
  readonly mmEmbeds?: boolean
  /** What E adds to each item's handle, as ECCPUConnector with NIXL does. */
  readonly handle?: Record<string, unknown>
}

/** What the next chat request meets in place of an answer. */
export type SmallFault = { readonly status: number, readonly error: object } | 'reset' | 'silence'

const RAW: ReadonlySet<string> = new Set(['image_url', 'video_url', 'audio_url', 'input_audio'])

export class SmallVllm {
  readonly options: SmallVllmOptions
  readonly files: Map<string, string>
  readonly seen: SeenBody[] = []
  readonly faults: SmallFault[] = []
  readonly engineId = randomUUID()
  /** Pictures that this server has encoded itself. */
  encoded: string[] = []
  /** Keys whose embedding this server has loaded. */
  loaded: string[] = []
  connections = 0
  dead = false
  #server: Server | undefined
  #port = 0
  readonly #sockets = new Set<Socket>()

  private constructor (options: SmallVllmOptions) {
    this.options = options
    this.files = options.files ?? new Map()
  }

  static async start (t: { teardown (run: () => Promise<void>): void }, options: SmallVllmOptions = {}): Promise<SmallVllm> {
    const server = new SmallVllm(options)
    await server.comeBack()
    t.teardown(async () => { server.die() })
    return server
  }

  get url (): string { return `http://127.0.0.1:${this.#port}` }
  get model (): string { return this.options.model ?? 'tiny' }

  async comeBack (): Promise<void> {
    if (this.#port === 0) this.#port = await freePort()
    this.dead = false
    const server = createServer((request, response) => { this.#serve(request, response).catch(() => { response.destroy() }) })
    server.keepAliveTimeout = 5000
    server.on('connection', socket => {
      this.connections++
      this.#sockets.add(socket)
      socket.on('close', () => { this.#sockets.delete(socket) })
      socket.on('error', () => {})
    })
    server.listen(this.#port, '127.0.0.1')
    await once(server, 'listening')
    this.#server = server
  }

  die (): void {
    this.dead = true
    this.#server?.close()
    for (const socket of this.#sockets) socket.destroy()
  }

  async #serve (request: IncomingMessage, response: ServerResponse): Promise<void> {
    const path = request.url ?? ''
    const json = (status: number, body: unknown): void => {
      const text = JSON.stringify(body)
      response.writeHead(status, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) }).end(text)
    }
    if (path === '/health') { response.writeHead(200).end(); return }
    if (path === '/version') return json(200, { version: '0.32.0' })
    if (path === '/v1/models') {
      const created = Math.floor(Math.random() * 1e9)
      return json(200, { object: 'list', data: [{ id: this.model, object: 'model', created, owned_by: 'vllm', root: '/models/tiny', parent: null, max_model_len: 8192, permission: [{ id: `modelperm-${created}` }] }] })
    }
    if (!path.startsWith('/v1/')) return json(404, { detail: 'Not Found' })
    const chunks: Buffer[] = []
    for await (const chunk of request as AsyncIterable<Buffer>) chunks.push(chunk)
    const body = JSON.parse(Buffer.concat(chunks).toString()) as SeenBody
    this.seen.push(body)
    const fault = this.faults.shift()
    if (fault === 'reset') { request.socket.destroy(); return }
    if (fault === 'silence') return
    if (fault !== undefined) return json(fault.status, { error: fault.error })
    const refusal = this.#refusal(body)
    if (refusal !== undefined) return json(400, { error: { message: refusal, type: 'BadRequestError', param: null, code: 400 } })
    const pictures = this.#look(body)
    if (typeof pictures === 'string') {
      json(500, { error: { message: pictures, type: 'InternalServerError', param: null, code: 500 } })
      if (pictures.startsWith('EngineCore')) response.on('close', () => { this.die() })
      return
    }
    const message = { role: 'assistant', content: this.options.role === 'e' ? '' : `I see ${pictures.length} pictures: ${pictures.join(' ')}` }
    if (body.stream === true) {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      response.end(`data: ${JSON.stringify({ id: 'c', object: 'chat.completion.chunk', choices: [{ index: 0, delta: message, finish_reason: 'stop' }] })}\n\ndata: [DONE]\n\n`)
      return
    }
    json(200, {
      id: 'chatcmpl-1',
      object: 'chat.completion',
      model: this.model,
      choices: [{ index: 0, message, finish_reason: body.max_tokens === 1 && this.options.role !== 'e' ? 'length' : 'stop' }],
      usage: { prompt_tokens: 10 + 64 * pictures.length, completion_tokens: this.options.role === 'e' ? 0 : 1 },
      ec_transfer_params: this.options.role === 'e' ? this.#handles(body) : null,
      kv_transfer_params: this.options.role === 'p' && body.kv_transfer_params?.do_remote_decode === true ? this.#keep(message.content) : null
    })
  }

  #refusal (body: SeenBody): string | undefined {
    const parts = partsOf(body)
    if (!parts.some(part => part.type === 'image_embeds')) return undefined
    if (this.options.mmEmbeds !== true) return 'You must set `--enable-mm-embeds` to input `image_embeds`'
    if (parts.some(part => part.type === 'image_url')) return 'Mixing raw image and embedding inputs is not allowed'
    const unknown = parts.flatMap(part => Object.keys(part.image_embeds ?? {})).find(name => name !== 'image_grid_thw')
    return unknown === undefined ? undefined : `JSON arrays are only supported for metadata: ${unknown}`
  }

  /** Short hashes of the pictures, as the model sees them; text: the failure. */
  #look (body: SeenBody): string[] | string {
    const { role } = this.options
    const handle = body.kv_transfer_params
    if (role === 'd' && handle?.do_remote_prefill === true) {
      const kept = SmallVllm.kept.get(String(handle.remote_request_id))
      return kept === undefined ? 'Internal server error' : kept.split(' ')
    }
    const pictures: string[] = []
    for (const part of partsOf(body)) {
      const dead = 'EngineCore encountered an issue. See stack trace (above) for the root cause.'
      if (part.type === 'image_embeds') {
        const stored = role === 'd' || part.uuid === undefined ? undefined : this.files.get(part.uuid)
        if (stored === undefined) return dead
        this.loaded.push(part.uuid!)
        pictures.push(short(stored))
        continue
      }
      const content = contentOf(part)
      const key = part.uuid ?? short(content)
      const stored = role === 'plain' ? undefined : this.files.get(key)
      if (role === 'pd' || role === 'p') {
        if (stored !== undefined && stored.length !== content.length) return dead
        if (stored !== undefined) this.loaded.push(key)
      }
      if (stored === undefined) this.encoded.push(key)
      if (role === 'e') this.files.set(key, stored ?? content)
      pictures.push(short(stored ?? content))
    }
    return pictures
  }

  #handles (body: SeenBody): Record<string, unknown> {
    const handles: Record<string, { item_indices: number[] }> = {}
    for (const [i, part] of partsOf(body).entries()) {
      const key = part.uuid ?? short(contentOf(part))
      handles[key] ??= { item_indices: [], ...{ metadata: { image_grid_thw: [1, 16, 16] }, ...this.options.handle } }
      handles[key].item_indices.push(i)
    }
    return handles
  }

  static readonly kept = new Map<string, string>()

  #keep (content: string): Record<string, unknown> {
    const id = `chatcmpl-${randomUUID()}`
    SmallVllm.kept.set(id, content.split(': ')[1] ?? '')
    return {
      do_remote_prefill: true,
      do_remote_decode: false,
      remote_block_ids: [[1]],
      remote_engine_id: this.engineId,
      remote_request_id: id,
      remote_host: '127.0.0.1',
      remote_port: 9203,
      tp_size: 1,
      remote_num_tokens: 79
    }
  }
}

export function partsOf (body: SeenBody): Part[] {
  return body.messages.flatMap(({ content }) => typeof content === 'string' ? [] : content.filter(part => part.type !== undefined && (RAW.has(part.type) || part.type.endsWith('_embeds'))))
}

function contentOf (part: Part): string {
  const value = part[part.type!] as { url?: string, data?: string } | null
  return value?.url ?? value?.data ?? ''
}

export function short (content: string): string {
  return createHash('sha256').update(content).digest('hex').slice(0, 12)
}
