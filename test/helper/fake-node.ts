/**
 * A model server scripted by tests, over real sockets, and the adapter that speaks its little protocol. What the core
 * does around nodes can be tested without any backend's own rules.
 */
import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo, Socket } from 'node:net'
import type { Test } from 'tap'
import { AdapterError, type Adapter, type EncoderResult, type Role } from '../../adapters/adapter.ts'
import { postStream, type UpstreamFailure } from '../../adapters/http.ts'
import { requestJson, requestOk } from '../../adapters/http/json.ts'
import type { NodeOptions } from '../../plugin/options/index.ts'

/** What the next call of a stage meets in place of an answer; `hold` waits until the test releases it. */
export type Fault = 'reset' | 'silence' | 'gone' | 'corrupt' | 'busy' | 'failed' | 'rejected' | 'half' | 'pause' | 'endless' | { readonly hold: Promise<void> }

export interface FakeNodeOptions {
  readonly role?: Role
  readonly models?: readonly string[]
  readonly vision?: 'full' | 'features' | 'none'
  readonly fingerprint?: string
  readonly maxPrefillTokens?: number
  readonly standalone?: boolean
}

export interface SeenCall { readonly path: string, readonly headers: IncomingMessage['headers'], readonly traceparents: readonly string[], readonly body: any, aborted: boolean }

const MODEL = 'vlm'

export class FakeNode {
  readonly options: FakeNodeOptions
  readonly seen: SeenCall[] = []
  readonly encodeFaults: Fault[] = []
  readonly prefillFaults: Fault[] = []
  readonly generateFaults: Fault[] = []
  readonly leases = new Set<string>()
  /** Of KV blocks, until they are pulled or released. */
  readonly handoffs = new Set<string>()
  readonly released: string[] = []
  readonly abortedRequests: string[] = []
  epoch = randomInt(1 << 30)
  answer = 'hello'
  /** Of GET /metrics; none: 404. */
  metrics: string | undefined
  #server: Server | undefined
  readonly #sockets = new Set<Socket>()
  #port = 0
  #leases = 0

  constructor (options: FakeNodeOptions = {}) {
    this.options = options
  }

  static async start (t: Pick<Test, 'teardown'>, options: FakeNodeOptions = {}): Promise<FakeNode> {
    const node = new FakeNode(options)
    await node.listen()
    t.teardown(() => node.close())
    return node
  }

  get url (): string { return `http://127.0.0.1:${this.#port}` }
  get role (): Role { return this.options.role ?? 'hybrid' }
  get spec (): NodeOptions { return { url: this.url, role: this.role, adapter: 'fake' } }
  calls (path: string): SeenCall[] { return this.seen.filter(call => call.path === path) }
  get prefills (): SeenCall[] { return this.calls('/prefill') }
  get generations (): SeenCall[] { return this.seen.filter(call => call.path.startsWith('/v1/')) }

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
  }

  /** As kill -9. */
  async close (): Promise<void> {
    const server = this.#server
    if (server === undefined) return
    this.#server = undefined
    for (const socket of this.#sockets) socket.resetAndDestroy()
    server.close()
    await once(server, 'close')
  }

  async #serve (request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk as Buffer)
    const text = Buffer.concat(chunks).toString()
    const path = request.url!
    const call: SeenCall = { path, headers: request.headers, traceparents: request.headersDistinct.traceparent ?? [], body: text === '' ? undefined : JSON.parse(text), aborted: false }
    if (path !== '/info' && path !== '/metrics') this.seen.push(call)
    response.on('close', () => { call.aborted = !response.writableFinished })
    if (path === '/info') this.#info(response)
    else if (path === '/metrics') response.writeHead(this.metrics === undefined ? 404 : 200, { 'content-type': 'text/plain' }).end(this.metrics)
    else if (path === '/encode') await this.#encode(call, response)
    else if (path === '/prefill') await this.#prefill(call, response)
    else if (path === '/pull') json(response, this.handoffs.delete(call.body.lease) ? 200 : 410, {})
    else if (path === '/release') this.#release(call, response)
    else if (path === '/abort') { this.abortedRequests.push(call.body.id); json(response, 200, {}) } else if (path === '/link') json(response, 200, {})
    else if (path.endsWith('?stream=true')) this.#stream(response, this.generateFaults.shift())
    else if (request.method === 'GET') json(response, path === '/v1/missing' ? 404 : 200, { path })
    else await this.#generate(call, response)
  }

  #info (response: ServerResponse): void {
    const { models = [MODEL], vision = this.role === 'encoder' ? 'full' : 'features', fingerprint = 'f', maxPrefillTokens, standalone } = this.options
    json(response, 200, {
      status: 'healthy',
      models,
      role: this.role,
      backend: 'fake',
      epoch: this.epoch,
      fingerprint,
      produces: { encoder: ['features:fake/1'], prefill: ['kv:fake/1'], decode: [], hybrid: [] }[this.role],
      accepts: { encoder: [], prefill: ['features:fake/1'], decode: ['kv:fake/1'], hybrid: ['features:fake/1'] }[this.role],
      vision,
      maxPrefillTokens,
      standalone
    })
  }

  async #encode (call: SeenCall, response: ServerResponse): Promise<void> {
    if (await misbehave(this.encodeFaults.shift(), response)) return
    const results = (call.body.items as Array<{ index: number, tokens: number }>).map(item => {
      const lease = `${this.#port}-${++this.#leases}`
      this.leases.add(lease)
      return { item: item.index, tokens: item.tokens, lease }
    })
    json(response, 200, { results })
  }

  #release (call: SeenCall, response: ServerResponse): void {
    for (const lease of call.body.leases as string[]) {
      this.released.push(lease)
      this.leases.delete(lease)
      this.handoffs.delete(lease)
    }
    json(response, 200, {})
  }

  async #prefill (call: SeenCall, response: ServerResponse): Promise<void> {
    if (await misbehave(this.prefillFaults.shift(), response)) return
    const lease = `kv-${this.#port}-${++this.#leases}`
    this.handoffs.add(lease)
    json(response, 200, { lease, tokens: 42 })
  }

  /** As D: pulls from P over a connection of its own. */
  async #pull (handoff: { node: string, lease: string }): Promise<boolean> {
    const answer = await fetch(`${handoff.node}/pull`, { method: 'POST', body: JSON.stringify({ lease: handoff.lease }) }).catch(() => undefined)
    await answer?.arrayBuffer()
    return answer?.status === 200
  }

  async #generate (call: SeenCall, response: ServerResponse): Promise<void> {
    const fault = this.generateFaults.shift()
    if (fault !== 'half' && fault !== 'pause' && fault !== 'endless' && await misbehave(fault, response)) return
    if (call.body.handoff !== undefined && !(await this.#pull(call.body.handoff))) { json(response, 410, { error: { message: 'no such KV blocks', type: 'x', code: 'kv_gone' } }); return }
    if (call.body.stream !== true) { json(response, 200, { object: 'chat.completion', model: call.body.model, choices: [{ message: { content: this.answer } }] }); return }
    this.#stream(response, fault)
  }

  #stream (response: ServerResponse, fault: Fault | undefined): void {
    if (fault === 'silence') return
    const event = `data: {"choices":[{"delta":{"content":"${this.answer}"}}]}\n\n`
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(event)
    if (fault === 'half') setTimeout(() => response.socket?.resetAndDestroy(), 20)
    else if (fault === 'endless') {
      const timer = setInterval(() => { response.write(event) }, 20)
      response.on('close', () => { clearInterval(timer) })
    } else if (fault !== 'pause') response.end('data: [DONE]\n\n')
  }
}

async function misbehave (fault: Fault | undefined, response: ServerResponse): Promise<boolean> {
  if (fault === undefined) return false
  if (typeof fault === 'object') {
    await fault.hold
    return false
  }
  const answers: Partial<Record<typeof fault, [number, string]>> = { gone: [410, 'features_gone'], corrupt: [502, 'kv_corrupt'], busy: [503, 'busy'], failed: [500, 'internal'], rejected: [400, 'invalid_media'] }
  const answer = answers[fault]
  if (fault === 'reset') response.socket?.resetAndDestroy()
  else if (answer !== undefined) json(response, answer[0], { error: { message: `scripted ${fault}`, type: 'x', code: answer[1], param: 'messages[0].content[0]' } }, fault === 'busy' ? { 'retry-after': '7' } : {})
  return true
}

function json (response: ServerResponse, status: number, body: unknown, headers: Record<string, string> = {}): void {
  response.writeHead(status, { 'content-type': 'application/json', ...headers }).end(JSON.stringify(body))
}

function readFailure ({ node, error }: UpstreamFailure): AdapterError | undefined {
  if (error.code === 'kv_gone' || error.code === 'kv_corrupt') return new AdapterError('KV_GONE', error.code, { node: node.id, unlinked: error.code === 'kv_gone' })
  return error.code === 'features_gone' ? new AdapterError('FEATURES_GONE', 'gone', { node: node.id }) : undefined
}

export const fakeAdapter: Adapter = {
  specificationVersion: 'v1',
  name: 'fake',
  async probe (node, call) {
    return await requestOk(node, { method: 'GET', path: '/info' }, call) as never
  },
  async link (a, b, call) {
    await requestOk(b, { method: 'POST', path: '/link', json: { from: a.id } }, call)
    return { from: a.id, to: b.id, transport: 'fake', epochs: [a.info?.epoch, b.info?.epoch] }
  },
  async encode ({ node, items, tenant }, call) {
    const answer = await requestOk(node, { method: 'POST', path: '/encode', timeout: 0, json: { tenant, items: items.map(({ index, tokens }) => ({ index, tokens })) } }, call)
    return (answer as { results: Array<{ item: number, tokens: number, lease: string }> }).results
      .map((result): EncoderResult => ({ ...result, node: node.id, cached: false, wire: result }))
  },
  async prefill ({ node, decode, path, features }, call) {
    const json = { decode: decode.id, path, features: features.map(feature => feature.lease) }
    const wire = await requestOk(node, { method: 'POST', path: '/prefill', timeout: 0, json }, call, readFailure) as { lease: string, tokens: number }
    return { node: node.id, lease: wire.lease, wire, tokens: wire.tokens }
  },
  async generate ({ node, path, body, features, handoff }, call) {
    const set = {
      ...(features.length === 0 ? {} : { features: JSON.stringify(features.map(feature => feature.lease)) }),
      ...(handoff === undefined ? {} : { handoff: JSON.stringify({ node: handoff.node, lease: handoff.lease }) })
    }
    return await postStream(node, { path, body: body.splice({ set }) }, call, readFailure)
  },
  async release (leases, call) {
    const nodes = new Map(leases.map(({ node }) => [node.id, node]))
    for (const [id, node] of nodes) {
      await requestJson(node, { method: 'POST', path: '/release', json: { leases: leases.filter(one => one.node.id === id).map(one => one.lease) } }, call).catch(() => {})
    }
  },
  async abort (node, id, call) {
    await requestJson(node, { method: 'POST', path: '/abort', json: { id } }, call).catch(() => {})
  }
}
