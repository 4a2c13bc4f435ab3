import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { PassThrough, pipeline, Readable, Transform } from 'node:stream'
import t, { type Test } from 'tap'
import { buildGateway, chat, post } from '../helper/fake-gateway.ts'
import { until } from '../helper/until.ts'

const PATH = '/v1/chat/completions'
const EVENT = 'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
const CLOSING = 'data: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'

type Answer = (response: ServerResponse) => void

/** A hook's ways with a stream. */
const WAYS: Readonly<Record<string, (payload: Readable) => Readable>> = {
  piped: payload => payload.pipe(new PassThrough()),
  'in a pipeline': payload => pipeline(payload, new PassThrough(), () => {}),
  iterated: payload => Readable.from(payload, { objectMode: false })
}

interface Setup { readonly ask: (body?: object, init?: RequestInit) => Promise<Response>, readonly inFlight: () => number, readonly gone: () => boolean, readonly metrics: () => Promise<string> }

/** A gateway whose onSend hook makes another stream of each, before an OpenAI-compatible server with scripted answers. */
async function setUp (t: Test, way: (payload: Readable) => Readable, answer: Answer): Promise<Setup> {
  let gone = false
  const server = createServer((request: IncomingMessage, response: ServerResponse) => {
    request.resume()
    if (request.method === 'GET') { response.setHeader('content-type', 'application/json').end('{"object":"list","data":[{"id":"vlm"}]}'); return }
    response.on('close', () => { gone = true })
    request.on('end', () => { answer(response) })
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  const { app, url } = await buildGateway(t, {
    before: app => { app.addHook('onSend', async (_request, _reply, payload) => payload instanceof Readable ? way(payload) : Buffer.isBuffer(payload) ? way(Readable.from([payload])) : payload) },
    options: { nodes: [{ url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, adapter: 'openai' }] }
  })
  await app.epd.nodes.waitFor(({ models }) => models.length > 0)
  return {
    ask: async (body = {}, init = {}) => await post(url + PATH, { ...chat('?'), ...body }, init),
    inFlight: () => app.epd.gateway.inFlight,
    gone: () => gone,
    metrics: async () => await (await fetch(`${url}/metrics`)).text()
  }
}

const head = (response: ServerResponse, more: Record<string, string> = {}): ServerResponse => response.writeHead(200, { 'content-type': 'text/event-stream', 'x-served-by': 'a', ...more })

for (const [name, way] of Object.entries(WAYS)) {
  t.test(`a stream ${name} by a hook keeps its headers, its events and its facts`, async t => {
    const { ask, metrics } = await setUp(t, way, response => { head(response).end(`${EVENT}${CLOSING}data: [DONE]\n\n`) })
    const answer = await ask({ stream: true })
    t.match(Object.fromEntries(answer.headers), { 'content-type': 'text/event-stream', 'cache-control': 'no-cache', 'x-accel-buffering': 'no', 'x-served-by': 'a', 'x-epd-plan': 'pd' })
    t.equal(await answer.text(), `${EVENT}${CLOSING}data: [DONE]\n\n`)
    t.match(await metrics(), /gen_ai_client_operation_time_to_first_chunk_seconds_count.* 1/)
  })

  t.test(`a stream ${name} by a hook that breaks off ends with an error event, and with no half one`, async t => {
    const { ask, inFlight } = await setUp(t, way, response => {
      head(response).write(EVENT)
      response.write('data: {"choices":[{"del', () => { response.destroy() })
    })
    t.match(await (await ask({ stream: true })).text(), new RegExp(`^${EVENT.replace(/[[\]{}]/g, '\\$&')}data: {"error":{[^\\n]*"upstream_broken"[^\\n]*\\n\\n$`))
    t.equal(inFlight(), 0)
  })

  t.test(`an answer ${name} by a hook that breaks off is seen to be cut`, async t => {
    const { ask, inFlight } = await setUp(t, way, response => {
      response.writeHead(200, { 'content-type': 'application/json', 'content-length': 1_000 })
      response.write('{"object":"chat', () => { response.destroy() })
    })
    const text = await ask().then(async answer => answer.status >= 500 ? 'cut' : await answer.text(), () => 'cut').catch(() => 'cut')
    t.equal(text, 'cut')
    await until(() => inFlight() === 0, 'nothing is in flight')
  })

  t.test(`a client that leaves a stream ${name} by a hook ends it at the node`, async t => {
    const { ask, inFlight, gone } = await setUp(t, way, response => { head(response).write(EVENT) })
    const leaving = new AbortController()
    await ask({ stream: true }, { signal: leaving.signal })
    leaving.abort()
    await until(() => gone() && inFlight() === 0, 'the node is left')
  })
}

t.test('a hook may make the body longer', async t => {
  const twice = (payload: Readable): Readable => payload.pipe(new Transform({ transform: (chunk, _encoding, done) => { done(null, Buffer.concat([chunk, chunk])) } }))
  const { ask } = await setUp(t, twice, response => { response.writeHead(200, { 'content-type': 'application/json', 'content-length': 16 }).end('{"choices":[{}]}') })
  t.equal(await (await ask()).text(), '{"choices":[{}]}{"choices":[{}]}')
})
