/** Clients that leave while something else than the gateway holds their request, over HTTP/1 and HTTP/2. */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type Server } from 'node:http'
import { connect as connectHttp2, constants, type ClientHttp2Session, type Http2ServerResponse, type ServerHttp2Stream } from 'node:http2'
import { connect, type AddressInfo } from 'node:net'
import type { FastifyHttpOptions, FastifyReply } from 'fastify'
import t, { type Test } from 'tap'
import { buildGateway, type FakeGateway } from '../helper/fake-gateway.ts'
import { ask, COMPLETION, json, modelServer, well, type Script } from '../helper/model-server.ts'
import { until } from '../helper/until.ts'

const CHAT = '/v1/chat/completions'
const KEY = { authorization: 'Bearer secret' }
const JSON_TYPE = { 'content-type': 'application/json' }
const { NGHTTP2_NO_ERROR, NGHTTP2_CANCEL } = constants

type Hook = (reply: FastifyReply) => Promise<void>

interface SetUp { readonly script?: Script, readonly node?: string, readonly hook?: Hook, readonly at?: 'onRequest' | 'preHandler', readonly fastify?: FastifyHttpOptions<Server> }

/** A gateway with one key that has one request at a time, behind a hook of the application. */
async function setUp (t: Test, { script = well, node, hook, at = 'onRequest', fastify = {} }: SetUp): Promise<FakeGateway> {
  const nodeUrl = node ?? (await modelServer(t, script)).url
  const hash = `sha256:${createHash('sha256').update('secret').digest('hex')}`
  const gateway = await buildGateway(t, {
    fastify,
    options: { nodes: [{ url: nodeUrl, adapter: 'openai' }], keys: [{ name: 'k', hash, concurrency: 1 }] },
    before: app => { if (hook !== undefined) app.addHook(at as 'onRequest', async (request, reply) => { if (request.headers['x-held'] !== undefined) await hook(reply) }) }
  })
  await gateway.app.epd.nodes.waitFor(({ models }) => models.includes('m'))
  return gateway
}

const HTTP2 = { http2: true } as unknown as FastifyHttpOptions<Server>

function session (t: Test, url: string): ClientHttp2Session {
  const client = connectHttp2(url)
  t.teardown(() => { client.destroy() })
  return client
}

const streamOf = ({ raw }: FastifyReply): ServerHttp2Stream => (raw as unknown as Http2ServerResponse).stream

async function statusOf (client: ClientHttp2Session): Promise<number> {
  const stream = client.request({ ':method': 'POST', ':path': CHAT, ...KEY, ...JSON_TYPE })
  stream.end(JSON.stringify(ask()))
  const [headers] = await once(stream, 'response') as [{ ':status': number }]
  stream.resume()
  await once(stream, 'close')
  return headers[':status']
}

t.test('HTTP/1: who leaves during a hook of the application gives its key\'s place back', async t => {
  let held = 0
  const { app, url } = await setUp(t, { hook: async ({ raw }) => { held++; await once(raw, 'close') } })
  const body = JSON.stringify(ask())
  const socket = connect(Number(new URL(url).port), '127.0.0.1')
  socket.write(`POST ${CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: ${KEY.authorization}\r\nx-held: 1\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`)
  await until(() => held === 1, 'the hook holds it')
  socket.destroy()
  await until(async () => (await fetch(url + CHAT, { method: 'POST', headers: { ...KEY, ...JSON_TYPE }, body })).status === 200, 'the place is free', 5_000)
  await until(() => app.epd.gateway.requests.size === 0, 'nothing is in flight')
})

for (const [name, code] of Object.entries({ NGHTTP2_NO_ERROR, NGHTTP2_CANCEL })) {
  t.test(`HTTP/2: a stream that is reset (${name}) during a hook of the application gives the node back`, async t => {
    let held = 0
    const { app, url } = await setUp(t, {
      fastify: HTTP2,
      script: (_request, response, { stream }) => {
        if (stream === true) response.writeHead(200, { 'content-type': 'text/event-stream' }).write(`data: {"choices":[{"delta":{"content":"${'x'.repeat(1_000_000)}"}}]}\n\n`)
        else json(response, 200, COMPLETION)
      },
      at: 'preHandler',
      hook: async reply => { held++; await until(() => streamOf(reply).destroyed, 'the stream is reset') }
    })
    const client = session(t, url)
    const stream = client.request({ ':method': 'POST', ':path': CHAT, 'x-held': '1', ...KEY, ...JSON_TYPE })
    stream.on('error', () => {}).end(JSON.stringify(ask({ stream: true })))
    await until(() => held === 1, 'the hook holds it')
    stream.close(code)
    t.equal(await statusOf(client), 200)
    await until(() => app.epd.gateway.requests.size === 0, 'nothing is in flight', 5_000)
  })

  t.test(`HTTP/2: a reset (${name}) while the client's window is full ends the node's answer`, async t => {
    let serving: ServerHttp2Stream | undefined
    const node = createServer(({ url }, response) => { json(response, 200, { data: [{ id: 'm' }], text: url === '/v1/files' ? 'x'.repeat(4 << 20) : '' }) }).listen(0, '127.0.0.1')
    t.teardown(() => { node.close(); node.closeAllConnections() })
    await once(node, 'listening')
    const { app, url } = await setUp(t, { fastify: HTTP2, node: `http://127.0.0.1:${(node.address() as AddressInfo).port}`, hook: async reply => { serving = streamOf(reply) } })
    const stream = session(t, url).request({ ':path': '/v1/files', 'x-held': '1', ...KEY })
    stream.on('error', () => {}).end()
    await until(() => serving?.writableNeedDrain, 'the window is full')
    t.equal(app.epd.gateway.requests.size, 1)
    stream.close(code)
    await until(() => app.epd.gateway.requests.size === 0, 'nothing is in flight', 5_000)
  })
}

t.test('an application that has answered by itself, such as by handlerTimeout, frees a node that answers later', async t => {
  let answer: (() => void) | undefined
  const { app, url } = await setUp(t, {
    fastify: { handlerTimeout: 30 } as FastifyHttpOptions<Server>,
    script: (_request, response) => { answer = () => { response.writeHead(200, JSON_TYPE).write('{"text":"'); response.write('x'.repeat(4 << 20)) } }
  })
  const socket = connect(Number(new URL(url).port), '127.0.0.1')
  t.teardown(() => { socket.destroy() })
  socket.write(`POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: ${KEY.authorization}\r\ncontent-length: 0\r\n\r\n`)
  const [data] = await once(socket, 'data') as [Buffer]
  t.match(data.toString(), /^HTTP\/1.1 503/)
  await until(() => answer !== undefined, 'the node is asked')
  answer!()
  await until(() => app.epd.gateway.requests.size === 0, 'nothing is in flight', 5_000)
  t.notOk(socket.destroyed, 'its connection is kept')
})
