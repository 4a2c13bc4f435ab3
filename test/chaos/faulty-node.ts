import { once } from 'node:events'
import { Agent, createServer, request, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { AHEAD_HEADER } from '../../adapters/wire/headers.ts'
import type { P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { FlakyProxy } from '../p2p/flaky-proxy.ts'
import type { Spoil } from './garbage.ts'

/** What happens to a POST below /v1/, or another path; everything else, health above all, passes as it is. */
export type NodeFault =
  | { readonly kind: 'none' }
  /** RST in place of an answer; the engine never sees the request. */
  | { readonly kind: 'reset' }
  /** Takes the request and never answers; the engine never sees it. */
  | { readonly kind: 'hang' }
  /** The engine serves the request, its answer is kept back. */
  | { readonly kind: 'hold' }
  /** Lets the request through to the engine only when the promise resolves. */
  | { readonly kind: 'wait', readonly until: Promise<unknown> }
  | { readonly kind: 'answer', readonly status: number, readonly headers?: Record<string, string>, readonly body: object }
  /** RST after so many chunks of the answer. */
  | { readonly kind: 'cut', readonly after: number }
  /** Silence after so many chunks of the answer. */
  | { readonly kind: 'stall', readonly after: number }
  /** The engine serves the request; its good answer is spoilt by what `choose` gives, if it gives anything. */
  | { readonly kind: 'garbage', readonly choose: () => Spoil | undefined }

/**
 * Stands in front of an engine under a URL of its own, which is the engine's id: what it does to requests is what a
 * sick node or network does. Survives the engine, so that another process may come back under the same id.
 */
export class FaultyNode {
  readonly url: string
  /** Requests that met a fault since it was set. */
  hits = 0
  /** Requests that passed, or met one, since the fault was set. */
  seen = 0
  /** Answers of the engine that have come in, in part at least, since the fault was set. */
  answered = 0
  #wire: { readonly proxy: FlakyProxy, readonly from: string, readonly endpoint: P2PEndpointInfo } | undefined
  /** Where the engine really listens. */
  readonly port: number
  #fault: NodeFault = { kind: 'none' }
  #left = Infinity
  #path = '/v1/'
  readonly #flakyWire: boolean
  readonly #server: Server
  readonly #agent = new Agent({ keepAlive: false })

  private constructor (server: Server, port: number, flakyWire: boolean) {
    this.#server = server
    this.port = port
    this.#flakyWire = flakyWire
    this.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
    server.on('request', (incoming: IncomingMessage, outgoing: ServerResponse) => { this.#handle(incoming, outgoing) })
  }

  static async listen (port: number, { flakyWire = false }: { flakyWire?: boolean } = {}): Promise<FaultyNode> {
    const server = createServer().listen(0, '127.0.0.1')
    await once(server, 'listening')
    return new FaultyNode(server, port, flakyWire)
  }

  /** @param times requests it befalls; the ones after pass */
  fail (fault: NodeFault, times = Infinity, path = '/v1/'): void {
    this.#fault = fault
    this.#path = path
    this.#left = times
    this.hits = this.seen = this.answered = 0
  }

  heal (): void {
    this.fail({ kind: 'none' })
  }

  /** The wire in place of the engine's ZeroMQ socket; there when it was asked for and the engine has been linked. */
  get wire (): FlakyProxy {
    return this.#wire!.proxy
  }

  async close (): Promise<void> {
    this.#server.closeAllConnections()
    this.#server.close()
    this.#agent.destroy()
    await this.#wire?.proxy.close()
  }

  #handle (incoming: IncomingMessage, outgoing: ServerResponse): void {
    const served = incoming.method === 'POST' && incoming.url?.startsWith(this.#path) === true
    // Word of a request that is still to come: faults that last befall it too, but what is counted is requests.
    const ahead = incoming.headers[AHEAD_HEADER] !== undefined
    if (served && !ahead) this.seen++
    const struck = served && this.#fault.kind !== 'none' && this.#left > (ahead ? Number.MAX_SAFE_INTEGER : 0)
    const fault: NodeFault = struck ? this.#fault : { kind: 'none' }
    if (struck && !ahead) {
      this.hits++
      this.#left--
    }
    outgoing.on('error', () => {})
    if (fault.kind === 'hang') { incoming.resume(); return }
    if (fault.kind === 'reset') { incoming.socket.resetAndDestroy(); return }
    if (fault.kind === 'wait') { fault.until.then(() => { this.#pass(incoming, outgoing, fault) }, () => {}); return }
    if (fault.kind !== 'answer') { this.#pass(incoming, outgoing, fault); return }
    incoming.resume().on('end', () => {
      outgoing.writeHead(fault.status, { 'content-type': 'application/json', ...fault.headers }).end(JSON.stringify(fault.body))
    })
  }

  #pass (incoming: IncomingMessage, outgoing: ServerResponse, fault: NodeFault): void {
    const upstream = request({ host: '127.0.0.1', port: this.port, path: incoming.url, method: incoming.method, headers: incoming.headers, agent: this.#agent })
    const broken = (): void => { incoming.socket.resetAndDestroy() }
    upstream.on('error', broken)
    // The engine must learn at once that its client has left.
    outgoing.on('close', () => { upstream.destroy() })
    incoming.pipe(upstream)
    upstream.on('response', response => {
      response.on('error', broken)
      if (this.#flakyWire && incoming.url === '/distserve/p2p_initialize') { this.#initialize(response, outgoing).catch(broken); return }
      this.#answer(response, outgoing, fault, incoming.headers[AHEAD_HEADER] !== undefined)
    })
  }

  #answer (response: IncomingMessage, outgoing: ServerResponse, fault: NodeFault, ahead: boolean): void {
    if (fault.kind === 'hold') {
      response.resume().on('end', () => { if (!ahead) this.answered++ })
      return
    }
    const spoil = fault.kind === 'garbage' && response.statusCode === 200 ? fault.choose() : undefined
    if (spoil !== undefined) {
      response.toArray().then(chunks => {
        const { type, body } = spoil(response.headers['content-type'] ?? '', Buffer.concat(chunks as Buffer[]))
        outgoing.writeHead(200, { 'content-type': type }).end(body)
      }, () => { outgoing.socket?.resetAndDestroy() })
      return
    }
    outgoing.writeHead(response.statusCode!, response.headers)
    outgoing.flushHeaders()
    let chunks = 0
    const after = fault.kind === 'cut' || fault.kind === 'stall' ? fault.after : Infinity
    response.on('data', (chunk: Buffer) => {
      if (chunks++ === 0 && !ahead) this.answered++
      if (chunks <= after) outgoing.write(chunk)
      else if (fault.kind === 'cut') outgoing.socket?.resetAndDestroy()
    })
    response.on('end', () => { if (chunks <= after) outgoing.end() })
  }

  /** The engine's own socket is reached through a wire that can be damaged. */
  async #initialize (response: IncomingMessage, outgoing: ServerResponse): Promise<void> {
    const answer = JSON.parse(Buffer.concat(await response.toArray() as Buffer[]).toString()) as { kvtransfer_endpoint_info: [{ endpoint_info: string }] }
    const [info] = answer.kvtransfer_endpoint_info
    if (this.#wire?.from !== info.endpoint_info) {
      await this.#wire?.proxy.close()
      this.#wire = { ...await FlakyProxy.before(JSON.parse(info.endpoint_info) as P2PEndpointInfo), from: info.endpoint_info }
    }
    info.endpoint_info = JSON.stringify(this.#wire.endpoint)
    const body = JSON.stringify(answer)
    outgoing.writeHead(response.statusCode!, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) }).end(body)
  }
}
