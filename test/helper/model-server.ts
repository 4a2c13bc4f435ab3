/** Model servers scripted by one function, and a gateway in front of them: what clients see of what servers do. */
import { once } from 'node:events'
import { createServer, type IncomingHttpHeaders, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import Fastify, { type FastifyInstance } from 'fastify'
import type { Test } from 'tap'
import epd, { type EpdOptions } from '../../plugin/index.ts'
import { until } from './until.ts'

export interface ModelServer {
  readonly url: string
  /** POSTs that have come. */
  asked: number
  /** As kill -9. */
  kill (): void
  up: boolean
}

export type Script = (request: IncomingMessage, response: ServerResponse, body: Record<string, unknown>, server: ModelServer) => void

export const COMPLETION = { id: 'c', object: 'chat.completion', created: 1, model: 'm', choices: [{ index: 0, message: { role: 'assistant', content: 'Hello' }, finish_reason: 'stop' }] }
export const CHUNK = `data: ${JSON.stringify({ id: 'c', object: 'chat.completion.chunk', created: 1, model: 'm', choices: [{ index: 0, delta: { content: 'Hello' }, finish_reason: null }] })}\n\n`

export function json (response: ServerResponse, status: number, value: unknown, headers: Record<string, string> = {}): void {
  response.writeHead(status, { 'content-type': 'application/json', ...headers }).end(JSON.stringify(value))
}

/** Answers as a well server does. */
export const well: Script = (_request, response, { stream }) => {
  if (stream === true) response.writeHead(200, { 'content-type': 'text/event-stream' }).end(`${CHUNK}data: [DONE]\n\n`)
  else json(response, 200, COMPLETION)
}

/** Of each answer, whole or streamed. */
export const USAGE = { prompt_tokens: 100, completion_tokens: 11, total_tokens: 111 }

/** Answers as `well` does, and tells its usage. */
export const telling: Script = (_request, response, { stream }) => {
  if (stream === true) response.writeHead(200, { 'content-type': 'text/event-stream' }).end(`${CHUNK}data: {"choices":[],"usage":${JSON.stringify(USAGE)}}\n\ndata: [DONE]\n\n`)
  else json(response, 200, { ...COMPLETION, usage: USAGE })
}

/** A server of model `m`: GETs are answered, POSTs are scripted. @param card what its card says besides */
export async function modelServer (t: Test, script: Script, card: object = {}): Promise<ModelServer> {
  const http = createServer((request, response) => {
    if (request.url === '/v1/models') { json(response, 200, { object: 'list', data: [{ id: 'm', object: 'model', ...card }] }); return }
    if (request.method === 'GET') { response.writeHead(request.url === '/health' ? 200 : 404).end(); return }
    server.asked++
    const chunks: Buffer[] = []
    request.on('data', (chunk: Buffer) => chunks.push(chunk)).on('error', () => {}).on('end', () => {
      const text = Buffer.concat(chunks).toString()
      script(request, response, (text === '' ? {} : JSON.parse(text)) as Record<string, unknown>, server)
    })
  })
  const server: ModelServer = { url: '', asked: 0, up: true, kill: () => { server.up = false; http.close(); http.closeAllConnections() } }
  t.teardown(() => { server.kill() })
  http.listen(0, '127.0.0.1')
  await once(http, 'listening')
  return Object.assign(server, { url: `http://127.0.0.1:${(http.address() as AddressInfo).port}` })
}

export interface Reply { readonly status: number, readonly headers: Headers, readonly text: string, readonly body: any }

export interface TestGateway {
  readonly url: string
  readonly app: FastifyInstance
  post (body: unknown, path?: string, headers?: IncomingHttpHeaders): Promise<Reply>
}

/** A gateway that finds all these servers well. */
export async function gatewayFor (t: Test, servers: readonly ModelServer[], options: EpdOptions = {}): Promise<TestGateway> {
  const app = Fastify()
  await app.register(epd, { embedded: false, nodes: servers.map(({ url }) => ({ url, adapter: 'openai' })), ...options })
  const url = await app.listen({ port: 0, host: '127.0.0.1' })
  t.teardown(async () => { await app.close() })
  await until(() => app.epd.gateway.health.nodes.healthy === servers.length, 'the nodes are healthy')
  return {
    url,
    app,
    post: async (body, path = '/v1/chat/completions') => {
      const response = await fetch(url + path, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) })
      const text = await response.text()
      let parsed: unknown
      try { parsed = JSON.parse(text) } catch {}
      return { status: response.status, headers: response.headers, text, body: parsed }
    }
  }
}

export const ask = (more: Record<string, unknown> = {}): Record<string, unknown> => ({ model: 'm', messages: [{ role: 'user', content: 'Hello' }], ...more })
