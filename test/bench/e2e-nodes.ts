/** Encoders and a language model without models, speaking the engines' wire: `e2e-nodes.js ENCODERS DELAY_MS [serial]`; `serial`: an encoder does one call after the other. */
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { serve } from './processes.ts'

const [encoders = '1', delay = '0', order] = process.argv.slice(2)
const PART = Buffer.from('"type":"image_url"')
const STREAM = Buffer.from('"stream":true')
const ANSWER = { id: 'chatcmpl-1', object: 'chat.completion', created: 1, model: 'm', choices: [{ index: 0, message: { role: 'assistant', content: 'x'.repeat(700) }, finish_reason: 'stop' }] }
const EVENT = `data: ${JSON.stringify({ id: 'chatcmpl-1', choices: [{ index: 0, delta: { content: ' token' }, finish_reason: null }] })}\n\n`
let leases = 0

type Answer = (body: Buffer, response: ServerResponse) => void

function info (role: 'encoder' | 'hybrid'): object {
  return {
    engine: 'fastify-epd',
    version: '0',
    backend: 'pytorch',
    role: role === 'encoder' ? 4 : 1,
    epoch: 1,
    model: 'm',
    fingerprint: 'f',
    vision: role === 'encoder' ? 'full' : 'features',
    tp_size: 1,
    produces: role === 'encoder' ? ['features:epd-zmq/1'] : [],
    accepts: role === 'encoder' ? [] : ['features:epd-zmq/1']
  }
}

async function listen (role: 'encoder' | 'hybrid', chat: (url: string) => Answer): Promise<string> {
  const server = createServer((request, response) => { answer(request, response).catch(() => { response.destroy() }) })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const onChat = chat(url)
  const fixed: Record<string, object> = {
    '/health': { status: 'healthy' },
    '/v1/models': { object: 'list', data: [{ id: 'm', object: 'model' }] },
    '/distserve/engine_info': info(role),
    '/distserve/p2p_initialize': { status: 1, engine_endpoint_info: { zmq_address: 'tcp://127.0.0.1:1' }, kvtransfer_endpoint_info: [] },
    '/distserve/p2p_connect': { status: 1 }
  }
  async function answer (request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk as Buffer)
    if (request.url === '/v1/chat/completions') onChat(Buffer.concat(chunks), response)
    else json(response, fixed[request.url!] ?? {})
  }
  return url
}

function json (response: ServerResponse, value: object): void {
  const text = JSON.stringify(value)
  response.writeHead(200, { 'content-type': 'application/json', 'content-length': text.length }).end(text)
}

/** When each encoder is free again. */
const freeAt = new Map<string, number>()

const encode = (url: string): Answer => (body, response) => {
  let count = 0
  for (let at = body.indexOf(PART); at !== -1; at = body.indexOf(PART, at + PART.length)) count++
  const results = Array.from({ length: count }, (_, part) => ({ message: 0, part, content_hash: 'h', modality: 'image', num_tokens: 256, grid: [1, 1], lease: (leases++).toString(16).padStart(16, '0'), remote_engine_id: url, remote_session_id: leases, remote_block_ids: [1, 2, 3, 4], cached: false }))
  const begin = order === 'serial' ? Math.max(performance.now(), freeAt.get(url) ?? 0) : performance.now()
  freeAt.set(url, begin + Number(delay))
  setTimeout(() => { json(response, { object: 'encoder.result', model: 'm', encoder_result: results }) }, begin + Number(delay) - performance.now())
}

const generate = (): Answer => (body, response) => {
  if (!body.includes(STREAM)) return json(response, ANSWER)
  // One event, and then the model thinks for as long as the client waits.
  response.writeHead(200, { 'content-type': 'text/event-stream' }).write(EVENT)
}

const urls = { encoders: await Promise.all(Array.from({ length: Number(encoders) }, async () => await listen('encoder', encode))), pd: await listen('hybrid', generate) }

serve({ urls: () => urls })
