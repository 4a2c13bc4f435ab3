/**
 * A stand-in for `vllm serve` 0.32.0 that replays what real servers sent (test/fixtures/vllm, made by test/vllm/record.ts):
 * heads, bodies and events as recorded, with the ids, keys, tokens and counts that the request decides put in their places.
 *
 * What an answer's tokens are depends on the text and on the pictures that were really looked at, so that a wrong embedding
 * gives a wrong answer. What kills a real server kills this one: 500, then the port refuses.
 */
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { join } from 'node:path'
import { jsonOf, plainBody, type Exchange } from '../vllm/exchange.ts'
import type { ReceivePool } from './fake-mooncake.ts'
import { consumeMedia, encodeMedia, receivePushed, SharedFolder, tokensOf, type Embedding, type Keyed, type MediaPart, type MediaRules, type Trouble } from './fake-vllm-media.ts'
import { freePort } from './free-port.ts'
import { packageRoot } from './package-root.ts'

export { SharedFolder }

export type VllmServer = 'plain' | 'e' | 'pd' | 'p' | 'd'

export interface FakeVllmOptions {
  /** As the recorded topologies name it. */
  readonly server: VllmServer
  /** Of E, PD and P. */
  readonly folder?: SharedFolder
  /** Of P and D. */
  readonly kv?: KvBlocks
  /** Started with --enable-mm-embeds; all but `plain` and `e` are, unless a test says otherwise. */
  readonly embeds?: boolean
  /** With ECMooncakeConnector. Of E: where it can push to. Of PD: its own, by data-parallel rank. */
  readonly pools?: readonly ReceivePool[]
  readonly port?: number
}

/** In place of the next chat answer. `die`: as if the request had killed the engine. */
export type VllmFault = 'die' | 'reset' | 'silence' | 'half' | { readonly hold: Promise<void> }

export interface VllmRequest {
  readonly path: string
  readonly headers: IncomingMessage['headers']
  readonly body: VllmBody
  aborted: boolean
}

export interface VllmBody {
  readonly model?: string
  readonly stream?: boolean
  readonly max_tokens?: number
  readonly max_completion_tokens?: number
  readonly return_token_ids?: boolean
  readonly stream_options?: { readonly include_usage?: boolean }
  readonly messages?: ReadonlyArray<{ readonly role: string, readonly content: string | ReadonlyArray<MediaPart & { readonly text?: string }> }>
  readonly kv_transfer_params?: Readonly<Record<string, unknown>> | null
  readonly ec_transfer_params?: { readonly consumer_zmq?: string, readonly ec_items?: ReadonlyArray<{ readonly transfer_id?: string, readonly mm_hash?: string }> } | null
  readonly mm_processor_kwargs?: object
}

/** KV blocks that P holds for D, by engine and request. */
export class KvBlocks {
  readonly engines = new Map<string, Map<string, { readonly seed: string, readonly at: number }>>()
  /** Times that D pulled blocks which P had given to others: a real server answers, wrongly. */
  expiredReads = 0
  now = (): number => performance.now()
}

const CHAT = '/v1/chat/completions'
const LEASE_MS = 30_000
const DEFAULT_TOKENS = 16

type Recording = Readonly<Record<string, Exchange>>
const read = new Map<VllmServer, Recording>()

/** What the real server of this name sent, by request, in the order in which it was asked. */
export function recordings (server: VllmServer): Recording {
  const all = read.get(server) ?? JSON.parse(readFileSync(join(packageRoot(), 'test/fixtures/vllm', `${server}.json`), 'utf8')) as Recording
  read.set(server, all)
  return all
}

/** An answer as this server was recorded giving it, or else one of the others. */
function recorded (server: VllmServer, name: string): Exchange {
  for (const one of [server, 'pd', 'plain', 'e', 'd', 'p'] as const) {
    const found = recordings(one)[name]
    if (found !== undefined) return found
  }
  throw new Error(`no server was recorded answering ${name}`)
}

export class FakeVllm {
  readonly server: VllmServer
  readonly seen: VllmRequest[] = []
  readonly faults: VllmFault[] = []
  /** How often it died of a request. */
  deaths = 0
  /** After an answer, as uvicorn; a test may shorten it. */
  keepAliveMs = 5000
  readonly #options: FakeVllmOptions
  readonly #sockets = new Set<Socket>()
  #rules: MediaRules
  #engineId = randomBytes(16).toString('hex')
  #listener: Server | undefined
  #port = 0

  constructor (options: FakeVllmOptions) {
    this.server = options.server
    this.#options = options
    this.#rules = this.#fresh()
  }

  static async start (t: { teardown: (run: () => Promise<void>) => void }, options: FakeVllmOptions): Promise<FakeVllm> {
    const fake = new FakeVllm(options)
    await fake.listen()
    t.teardown(() => fake.kill())
    return fake
  }

  get url (): string { return `http://127.0.0.1:${this.#port}` }
  get alive (): boolean { return this.#listener !== undefined }
  get connections (): number { return this.#sockets.size }
  get chats (): VllmRequest[] { return this.seen.filter(request => request.path === CHAT) }

  /** Starts, or starts again at the same port with empty caches: another process. */
  async listen (): Promise<void> {
    if (this.#port === 0) this.#port = this.#options.port ?? await freePort()
    this.#rules = this.#fresh()
    this.#engineId = randomBytes(16).toString('hex')
    const listener = createServer((request, response) => { this.#serve(request, response).catch(() => { response.destroy() }) })
    listener.keepAliveTimeout = this.keepAliveMs
    listener.on('connection', socket => {
      this.#sockets.add(socket)
      socket.on('close', () => { this.#sockets.delete(socket) }).on('error', () => {})
    })
    listener.listen(this.#port, '127.0.0.1')
    await once(listener, 'listening')
    this.#listener = listener
  }

  /** As kill -9: connections break, the port refuses, P's blocks are gone. */
  async kill (): Promise<void> {
    const listener = this.#listener
    if (listener === undefined) return
    this.#listener = undefined
    this.#options.kv?.engines.delete(this.#engineId)
    for (const socket of this.#sockets) socket.resetAndDestroy()
    listener.close()
    await once(listener, 'close')
  }

  #fresh (): MediaRules {
    const { server, embeds = server !== 'plain' && server !== 'e', folder } = this.#options
    return { embeds, folder: server === 'plain' || server === 'd' ? undefined : folder, cache: new Map<string, Embedding>() }
  }

  async #serve (request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk as Buffer)
    const text = Buffer.concat(chunks).toString()
    const path = request.url!.split('?')[0]!
    const seen: VllmRequest = { path, headers: request.headers, body: text === '' ? {} : JSON.parse(text) as VllmBody, aborted: false }
    this.seen.push(seen)
    response.on('close', () => { seen.aborted = !response.writableFinished })
    const simple = { '/health': 'health', '/v1/models': 'models', '/version': 'version' }[path]
    if (simple !== undefined && request.method === 'GET') this.#replay(response, simple, seen)
    else if (path !== CHAT || request.method !== 'POST') this.#replay(response, 'unknown-route', seen)
    else if (Array.isArray(seen.body)) this.#replay(response, 'not-json', seen)
    else if (seen.body.model !== undefined && seen.body.model !== 'tiny') this.#replay(response, 'unknown-model', seen)
    else await this.#chat(seen, response)
  }

  async #chat (seen: VllmRequest, response: ServerResponse): Promise<void> {
    const fault = this.faults.shift()
    if (fault === 'silence') return
    if (fault === 'reset') { response.socket?.resetAndDestroy(); return }
    if (typeof fault === 'object') await fault.hold
    if (fault === 'die') { this.#trouble(response, 'deadly', seen); return }
    const { body } = seen
    if (body.mm_processor_kwargs !== undefined) { this.#replay(response, 'encode-kwargs', seen); return }
    const { pools } = this.#options
    const pool = this.server === 'e' ? undefined : pools?.[Number(seen.headers['x-data-parallel-rank'] ?? 0)]
    const trouble = pool === undefined ? undefined : await receivePushed(mediaOf(body), this.#rules, pool, body.ec_transfer_params ?? {})
    const media = trouble ?? await (this.server === 'e' ? encodeMedia : consumeMedia)(mediaOf(body), this.#rules)
    if (typeof media === 'string') this.#trouble(response, media, seen)
    else if (this.server === 'e') this.#encoded(response, seen, media)
    else this.#generate(response, seen, media, fault)
  }

  #encoded (response: ServerResponse, seen: VllmRequest, media: readonly Keyed[]): void {
    if (seen.body.stream === true) { this.#replay(response, 'encode-stream', seen); return }
    const { consumer_zmq: consumer, ec_items: items = [] } = seen.body.ec_transfer_params ?? {}
    const pool = this.#options.pools?.find(({ address }) => address === consumer)
    const params: Record<string, { item_indices: number[], metadata: object, transfer_id?: string | undefined }> = {}
    media.forEach(({ key, grid, content }, i) => {
      const transfer = items[i]?.transfer_id
      params[key] ??= { item_indices: [], metadata: { image_grid_thw: grid } }
      params[key].item_indices.push(i)
      if (transfer === undefined) return
      params[key].transfer_id = transfer
      pool?.push(transfer, { content, grid })
    })
    const one = recorded('e', 'encode')
    const answer = jsonOf(one)
    this.#send(response, one, seen, {
      ...answer, id: newId(), usage: { ...answer.usage as object, ...counts(media, 0) }, ec_transfer_params: media.length === 0 ? null : params
    })
  }

  #generate (response: ServerResponse, seen: VllmRequest, media: readonly Keyed[], fault: VllmFault | undefined): void {
    const { body } = seen
    let seed = seedOf(body, media)
    const handle = body.kv_transfer_params ?? undefined
    if (this.server === 'd') {
      const pulled = handle?.do_remote_prefill === true ? this.#pull(handle) : undefined
      if (handle?.do_remote_prefill === true && pulled === undefined) { this.#replay(response, body.stream === true ? 'unknown-engine-stream' : 'unknown-engine', seen); return }
      seed = pulled ?? seed
    }
    const length = body.max_completion_tokens ?? body.max_tokens ?? DEFAULT_TOKENS
    const tokens = Array.from({ length }, (_, i) => createHash('sha256').update(`${seed} ${i}`).digest().readUInt16BE() % 900 + 8)
    const kv = this.server === 'p' && handle?.do_remote_decode === true ? this.#hold(seed, media) : null
    if (body.stream === true) this.#stream(response, seen, media, tokens, fault)
    else this.#whole(response, seen, media, tokens, kv)
  }

  #pull (handle: Readonly<Record<string, unknown>>): string | undefined {
    const kv = this.#options.kv
    const blocks = kv?.engines.get(String(handle.remote_engine_id))?.get(String(handle.remote_request_id))
    if (blocks === undefined) return undefined
    if (kv!.now() - blocks.at < LEASE_MS) return blocks.seed
    kv!.expiredReads++
    return 'the blocks of another request'
  }

  #hold (seed: string, media: readonly Keyed[]): object {
    const kv = this.#options.kv!
    const requests = kv.engines.get(this.#engineId) ?? new Map<string, { seed: string, at: number }>()
    const id = newId()
    kv.engines.set(this.#engineId, requests.set(id, { seed, at: kv.now() }))
    const params = jsonOf(recorded('p', 'prefill')).kv_transfer_params as object
    return { ...params, remote_engine_id: this.#engineId, remote_request_id: id, remote_port: this.#port + 100, remote_num_tokens: counts(media, 0).prompt_tokens }
  }

  #whole (response: ServerResponse, seen: VllmRequest, media: readonly Keyed[], tokens: readonly number[], kv: object | null): void {
    const one = recorded('pd', 'picture')
    const answer = jsonOf(one)
    const [choice] = answer.choices as Array<{ message: object }>
    const ids = seen.body.return_token_ids === true
    this.#send(response, one, seen, {
      ...answer,
      id: newId(),
      choices: [{ ...choice, message: { ...choice!.message, content: wordsOf(tokens).join('') }, token_ids: ids ? tokens : null }],
      usage: { ...answer.usage as object, ...counts(media, tokens.length) },
      prompt_token_ids: ids ? answer.prompt_token_ids : null,
      kv_transfer_params: kv
    })
  }

  #stream (response: ServerResponse, seen: VllmRequest, media: readonly Keyed[], tokens: readonly number[], fault: VllmFault | undefined): void {
    const counted = seen.body.stream_options?.include_usage === true
    const one = recorded('pd', counted ? 'text-stream' : 'picture-stream')
    const events = plainBody(one.head, one.body).split('\n\n').filter(event => event.startsWith('data: {')).map(event => JSON.parse(event.slice(6)) as { choices: Array<{ delta: object, stop_reason?: unknown, token_ids?: unknown }> })
    const first = events[0]!
    const last = events.findLast(event => event.choices.length > 0)!
    const usage = counted ? [{ ...events.at(-1)!, usage: counts(media, tokens.length) }] : []
    const id = newId()
    const ids = seen.body.return_token_ids === true
    const words = wordsOf(tokens)
    // A real server puts several tokens into an event when it is ahead of the client.
    const said = tokens.map((token, i) => {
      const { stop_reason: reason, token_ids: _, ...choice } = last.choices[0]!
      const end = i === tokens.length - 1 ? { stop_reason: reason } : { finish_reason: null }
      return { ...(i === tokens.length - 1 ? last : first), choices: [{ ...choice, delta: { content: words[i] }, ...end, ...(ids ? { token_ids: [token] } : {}) }] }
    })
    writeHead(response, one.head, seen)
    const all = [first, ...said, ...usage].map(event => `data: ${JSON.stringify({ ...event, id })}\n\n`)
    if (fault === 'half') {
      for (const event of all.slice(0, 2)) response.write(event)
      setTimeout(() => response.socket?.resetAndDestroy(), 20)
      return
    }
    for (const event of all) response.write(event)
    response.end('data: [DONE]\n\n')
  }

  #trouble (response: ServerResponse, trouble: Trouble, seen: VllmRequest): void {
    // As a request of which the engine says that it may be sent again.
    if (trouble === 'not-pushed') { this.#replay(response, seen.body.stream === true ? 'unknown-engine-stream' : 'unknown-engine', seen); return }
    if (trouble !== 'deadly') { this.#replay(response, trouble, seen); return }
    this.#replay(response, seen.body.stream === true ? 'deadly-stream' : 'deadly', seen)
    this.deaths++
    response.once('finish', () => { setTimeout(() => { this.kill().catch(() => {}) }, 5) })
  }

  /** An answer that no request changes. A real 500 is followed by the end of the connection, which no header announces. */
  #replay (response: ServerResponse, name: string, seen: VllmRequest): void {
    const one = recorded(this.server, name)
    this.#send(response, one, seen, undefined)
    if (one.closedAfterMs !== null) response.once('finish', () => { setTimeout(() => { response.req.socket.destroy() }, 10) })
  }

  #send (response: ServerResponse, one: Exchange, seen: VllmRequest, json: object | undefined): void {
    const body = json === undefined ? Buffer.from(plainBody(one.head, one.body), 'latin1') : Buffer.from(JSON.stringify(json))
    writeHead(response, one.head, seen, body.length)
    response.end(body)
  }
}

/** The recorded head: the same headers in the same order. */
function writeHead (response: ServerResponse, head: string, seen: VllmRequest, length?: number): void {
  response.sendDate = false
  response.removeHeader('connection')
  const lines = head.trimEnd().split('\r\n').slice(1).map(line => line.split(': ', 2) as [string, string])
  const headers = lines.map(([name, value]): [string, string] => {
    if (name === 'content-length') return [name, String(length)]
    if (name === 'x-request-id') return [name, String(seen.headers['x-request-id'] ?? randomBytes(16).toString('hex'))]
    return [name, value]
  })
  response.writeHead(Number(head.split(' ')[1]), headers.flat())
}

function mediaOf (body: VllmBody): MediaPart[] {
  return (body.messages ?? []).flatMap(({ content }) => typeof content === 'string' ? [] : content.filter(part => part.type !== 'text'))
}

/** The prompt as the model sees it: text, and embeddings in place of pictures. */
function seedOf (body: VllmBody, media: readonly Keyed[]): string {
  const rest = [...media]
  return JSON.stringify((body.messages ?? []).map(({ role, content }) => [role, typeof content === 'string' ? content : content.map(part => part.text ?? rest.shift()?.content)]))
}

const PROMPT_TOKENS = 11

function counts (media: readonly Keyed[], completion: number): { prompt_tokens: number, total_tokens: number, completion_tokens: number } {
  const prompt = media.reduce((sum, one) => sum + 2 + tokensOf(one), PROMPT_TOKENS)
  return { prompt_tokens: prompt, total_tokens: prompt + completion, completion_tokens: completion }
}

function wordsOf (tokens: readonly number[]): string[] {
  return tokens.map(token => ` w${token}`)
}

function newId (): string {
  return `chatcmpl-${randomBytes(8).toString('hex')}`
}
