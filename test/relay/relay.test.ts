import cors from '@fastify/cors'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyReply } from 'fastify'
import { once } from 'node:events'
import { createServer, get, request as httpRequest } from 'node:http'
import type { IncomingHttpHeaders, IncomingMessage, RequestOptions, ServerResponse } from 'node:http'
import { connect as connectHttp2 } from 'node:http2'
import { connect } from 'node:net'
import type { AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import t from 'tap'
import type { Test } from 'tap'
import { Agent } from 'undici'
import type { UpstreamResponse } from '../../adapters/adapter.ts'
import { TimeLimit } from '../../adapters/abort.ts'
import { postStream } from '../../adapters/http.ts'
import { deliver, onClientGone } from '../../plugin/http/client.ts'
import { beginAnswer, type Delivery } from '../../plugin/pipeline/index.ts'
import type { Closing } from '../../plugin/pipeline/usage.ts'
import { Random } from '../body/random-json.ts'
import { until } from '../helper/until.ts'
import { cut, event, frame, rawUpstream, scripted, SSE, unchunk } from './upstreams.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const HEAD = 'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n'
const DONE = 'data: [DONE]\n\n'
const BROKEN = { message: 'The model server broke off in the middle of its answer', type: 'server_error', code: 'upstream_broken', param: null }

interface Gateway { app: FastifyInstance, port: number, results: Array<Promise<Delivery>> }
interface Answered { statusCode: number, headers: IncomingHttpHeaders, body: Buffer, error?: Error }
interface Options { headers?: Record<string, string>, signal?: AbortSignal, idle?: number, http2?: true }

async function relay (upstream: UpstreamResponse, reply: FastifyReply, { headers = {}, signal, idle = 60_000 }: Options): Promise<Delivery> {
  const limit = new TimeLimit(0, signal)
  onClientGone(reply.raw, () => { limit.abort(new Error('client gone')) })
  const answer = await beginAnswer('http://node', upstream, limit, idle)
  deliver(answer, reply, headers)
  return await answer.delivered
}

/** A gateway that relays the answers that `open` gives. */
async function gateway (t: Test, open: (reply: FastifyReply) => UpstreamResponse | Promise<UpstreamResponse>, options: Options = {}, setUp?: (app: FastifyInstance) => Promise<void>): Promise<Gateway> {
  const app = (options.http2 ? Fastify({ http2: true, forceCloseConnections: true }) : Fastify({ forceCloseConnections: true })) as FastifyInstance
  t.teardown(() => app.close())
  await setUp?.(app)
  const results: Array<Promise<Delivery>> = []
  app.all('/', async (_request, reply) => {
    const result = relay(await open(reply), reply, options)
    results.push(result)
    result.catch(() => {})
    await result.catch((error: Error) => {
      if (!reply.raw.destroyed) return reply.code(502).send({ failed: error.message })
    })
    return reply
  })
  await app.listen({ port: 0, host: '127.0.0.1' })
  return { app, port: (app.server.address() as AddressInfo).port, results }
}

async function ask (port: number, options: RequestOptions = {}): Promise<Answered> {
  const request = httpRequest({ port, host: '127.0.0.1', agent: false, ...options })
  request.end()
  const [response] = await once(request, 'response') as [IncomingMessage]
  return await collect(response)
}

async function collect (response: IncomingMessage): Promise<Answered> {
  const chunks: Buffer[] = []
  const answer = (error?: Error): Answered => ({ statusCode: response.statusCode!, headers: response.headers, body: Buffer.concat(chunks), ...(error === undefined ? {} : { error }) })
  try {
    for await (const chunk of response) chunks.push(chunk as Buffer)
    return answer()
  } catch (error) {
    return answer(error as Error)
  }
}

const events = (newline: string): Buffer => Buffer.from([
  event({ id: 1, choices: [{ delta: { content: 'h\u00e9 \u{1f600}' } }] }, newline), `: comment${newline}${newline}`,
  event({ choices: [{ delta: {}, finish_reason: 'stop' }] }, newline), `event: x${newline}data: {"a":${newline}data: 1}${newline}${newline}`,
  event({ choices: [], usage: { prompt_tokens: 5, completion_tokens: 7, total_tokens: 12, prompt_tokens_details: { cached_tokens: 3 } } }, newline), `data: [DONE]${newline}${newline}`
].join(''))

t.test('a stream without [DONE] is whole, however many pieces follow its finish reason', async t => {
  let pings = 0
  const pieces = (): string[] => [
    event({ choices: [{ delta: { content: 'x' } }] }), event({ choices: [{ delta: {}, finish_reason: 'stop' }] }), event({ choices: [], usage: { prompt_tokens: 5 } }),
    ...Array.from({ length: pings }, () => ': ping\n\n')
  ]
  const { port, results } = await gateway(t, () => scripted(pieces().map(piece => Buffer.from(piece)), SSE))
  for (; pings < 20; pings++) {
    t.equal((await ask(port)).body.toString(), pieces().join(''))
    t.match(await results.at(-1)!, { outcome: 'complete' }, `${pings} pings`)
  }
})

t.test('a stream of choices that ends in good order is whole with [DONE] or a finish reason only, whatever its text and however long its last event', async t => {
  let last!: string
  // Adapters that look at no answer may give on what a node says before it.
  let begin: string[] = []
  const { port, results } = await gateway(t, () => scripted([...begin, event({ choices: [{ delta: { content: 'x' } }] }), last].map(piece => Buffer.from(piece)), SSE))
  const more = { logprobs: 'p'.repeat(20_000) }
  const said = (content: string, rest: object = {}, choice: object = {}): string => event({ choices: [{ delta: { content }, ...choice }], ...rest })
  const cases: Array<[string, Delivery['outcome']]> = [
    [said('x', more), 'upstream_failed'], [said('[DONE]'), 'upstream_failed'], [said('\ndata: [DONE]\n\n'), 'upstream_failed'], [said('"finish_reason":"stop"'), 'upstream_failed'],
    [said('x', more, { finish_reason: 'stop' }), 'complete'], [said('x', more) + DONE, 'complete'], [said('x') + DONE.replaceAll('\n', '\r'), 'complete'], [said('x') + 'data:[DONE]\n\n', 'complete']
  ]
  for (const [end, outcome] of cases) {
    last = end
    const body = (await ask(port)).body.toString()
    t.equal(body.includes('upstream_broken'), outcome === 'upstream_failed', end.slice(0, 60))
    t.match(await results.at(-1)!, { outcome })
  }
  begin = [': alive\n\n']
  last = said('x')
  t.match((await ask(port)).body.toString(), /upstream_broken/, 'a sign of life came first')
})

t.test('after [DONE] a stream is whole, whether its node falls silent or breaks off', async t => {
  const said = event({ choices: [{ delta: { content: 'x' } }], usage: { prompt_tokens: 5 } }) + DONE
  const silent = (): UpstreamResponse => {
    const body = new Readable({ read () {} })
    body.push(said)
    return { statusCode: 200, headers: SSE, body }
  }
  const open = [silent, () => scripted([Buffer.from(said)], SSE, new Error('cut'))]
  const { port, results } = await gateway(t, () => open[results.length]!(), { idle: 20 })
  for (const way of ['silent', 'cut']) {
    t.equal((await ask(port)).body.toString(), said, way)
    const result = await results.at(-1)!
    t.match([result.outcome, result.closing().usage?.promptTokens], ['complete', 5], way)
  }
})

t.test('bytes arrive as they were sent, however they were cut', async t => {
  const random = new Random(3)
  let upstream!: UpstreamResponse
  const { port, results } = await gateway(t, () => upstream)
  for (let i = 0; i < (FULL ? 400 : 60); i++) {
    const bytes = events(random.pick(['\n', '\r\n', '\r'])).subarray(0, i % 5 === 0 ? 200 : undefined)
    const places = i === 0 ? Array.from({ length: bytes.length }, (_, n) => n) : Array.from({ length: random.below(12) }, () => random.below(bytes.length))
    upstream = scripted(cut(bytes, places), SSE)
    const since = performance.now()
    const { body, headers } = await ask(port)
    if (!body.equals(bytes)) t.equal(body.toString(), bytes.toString(), `cut at ${places.join()}`)
    t.notOk(headers['content-length'])
    const result = await results.at(-1)!
    t.match(result, { outcome: 'complete', statusCode: 200 })
    if (places.length < 3 && i % 5 !== 0) {
      t.match(result.closing(), { finishReason: 'stop', usage: { promptTokens: 5, completionTokens: 7, totalTokens: 12, cachedTokens: 3 } })
      t.ok(since <= result.firstByteAt! && result.firstByteAt! <= performance.now())
    }
  }
})

t.test('an upstream that breaks off leaves whole events, then an error event', async t => {
  const random = new Random(4)
  let upstream!: UpstreamResponse
  const { port, results } = await gateway(t, () => upstream)
  const bytes = Buffer.from(Array.from({ length: 9 }, (_, i) => event({ i, text: 'x'.repeat(i * 10) })).join(''))
  for (let i = 0; i < (FULL ? 300 : 50); i++) {
    const part = bytes.subarray(0, 30 + random.below(bytes.length - 30))
    upstream = scripted(cut(part, Array.from({ length: random.below(6) }, () => 1 + random.below(part.length - 1))), SSE, new Error('gone away'))
    const { body, error } = await ask(port)
    t.equal(error, undefined, 'the stream ends properly')
    const seen = body.toString().split('\n\n')
    t.equal(seen.pop(), '')
    t.strictSame(JSON.parse(seen.pop()!.slice(6)), { error: BROKEN })
    t.strictSame(seen.map(text => (JSON.parse(text.slice(6)) as { i: number }).i), Array.from({ length: part.toString().split('\n\n').length - 1 }, (_, n) => n))
    t.match(await results.at(-1), { outcome: 'upstream_failed', error: { message: 'gone away' } })
  }
  // An event too long to hold back is closed before the error.
  upstream = scripted([Buffer.from('data: "a"\n\n'), Buffer.from('data: ' + 'y'.repeat(300_000))], SSE, new Error('gone away'))
  const { body } = await ask(port)
  t.match(body.toString().slice(-200), /y\n\ndata: \{"error":/)
  t.match(await results.at(-1), { outcome: 'upstream_failed' })
})

t.test('a reset connection is an error event in a stream and a broken connection elsewhere', async t => {
  const stream = await rawUpstream(t, socket => { socket.write(Buffer.concat([Buffer.from(HEAD), frame(event(1)), frame('data: {"ha')])) })
  const first = await gateway(t, async () => await stream.open())
  const request = get({ port: first.port, host: '127.0.0.1', agent: false })
  const [response] = await once(request, 'response') as [IncomingMessage]
  await until(() => response.readableLength > 0, 'the first event')
  ;(await stream.socket()).resetAndDestroy()
  const answer = await collect(response)
  t.equal(answer.error, undefined)
  t.equal(answer.body.toString(), `data: 1\n\ndata: ${JSON.stringify({ error: BROKEN })}\n\n`)
  t.match(await first.results[0], { outcome: 'upstream_failed' })

  for (const framing of ['content-length: 100\r\n\r\n{"half"', `transfer-encoding: chunked\r\n\r\n${frame('{"half"').toString()}`]) {
    const json = await rawUpstream(t, socket => { socket.write(`HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n${framing}`) })
    const second = await gateway(t, async () => await json.open())
    const request = get({ port: second.port, host: '127.0.0.1', agent: false })
    const [response] = await once(request, 'response') as [IncomingMessage]
    await until(() => response.readableLength > 0, 'the first bytes')
    ;(await json.socket()).resetAndDestroy()
    const answer = await collect(response)
    t.equal(answer.body.toString(), '{"half"')
    t.match(answer.error, { code: 'ECONNRESET' }, 'a client can tell that it is not whole')
    t.match(await second.results[0], { outcome: 'upstream_failed' })
  }
})

t.test('over HTTP/2 too a client can tell that an answer is not whole', async t => {
  for (const [name, size] of [['JSON above 1 MiB', 1_200_000], ['a stream without events', 10]] as const) {
    const json = await rawUpstream(t, socket => { socket.write(`HTTP/1.1 200 OK\r\ncontent-type: ${size > 10 ? 'application/json' : 'audio/wav'}\r\ntransfer-encoding: chunked\r\n\r\n${frame('x'.repeat(size)).toString()}`) })
    const { port, results } = await gateway(t, async () => await json.open(), { http2: true })
    const client = connectHttp2(`http://127.0.0.1:${port}`)
    t.teardown(() => { client.destroy() })
    const stream = client.request({ ':path': '/' })
    let [length, failed] = [0, undefined as Error | undefined]
    stream.on('data', (data: Buffer) => { length += data.length }).on('error', error => { failed = error })
    await until(() => length === size, 'what has come is passed on')
    ;(await json.socket()).resetAndDestroy()
    await new Promise(resolve => stream.once('close', resolve))
    t.match(failed, { code: 'ERR_HTTP2_STREAM_ERROR' }, name)
    t.equal(stream.rstCode, 2, name)
    t.match(await results[0], { outcome: 'upstream_failed' })
  }
})

t.test('a header that no response can carry stays behind', async t => {
  const upstream = scripted([Buffer.from('{}')], { 'content-type': 'application/json', 'x-model': '\u6a21', 'x-good': 'caf\u00e9' })
  const { port } = await gateway(t, () => upstream)
  const { statusCode, headers, body } = await ask(port)
  t.match({ statusCode, headers, body: body.toString() }, { statusCode: 200, headers: { 'x-good': 'caf\u00e9' }, body: '{}' })
  t.notOk(headers['x-model'])
})

t.test('before the first byte a failure rejects and the reply is untouched', async t => {
  let upstream!: UpstreamResponse
  const { port, results } = await gateway(t, () => upstream)
  upstream = scripted([], { 'content-type': 'application/json', 'x-a': 'b' }, new Error('nobody there'))
  const answer = await ask(port)
  t.equal(answer.statusCode, 502)
  t.strictSame(JSON.parse(answer.body.toString()), { failed: 'the answer broke off before it began' })
  t.notOk(answer.headers['x-a'])
  await t.rejects(results[0]!, { code: 'UNAVAILABLE', node: 'http://node', cause: { message: 'nobody there' } })
  upstream = scripted([], { 'content-type': 'application/json' }, undefined, 204)
  t.match(await ask(port), { statusCode: 204, body: Buffer.alloc(0) })
  t.match(await results[1], { outcome: 'complete' })
  upstream = scripted([], SSE, new Error('gone before an event'))
  t.equal((await ask(port)).statusCode, 502)
  await t.rejects(results.at(-1)!, { cause: { message: 'gone before an event' } })
  upstream = scripted([Buffer.from('data: {"ha')], SSE, new Error('gone in the first event'))
  t.equal((await ask(port)).statusCode, 502)
  await t.rejects(results.at(-1)!, { cause: { message: 'gone in the first event' } })
})

t.test('the signal ends a relay', async t => {
  const before = new AbortController()
  before.abort(new Error('too late'))
  const never = await rawUpstream(t, socket => { socket.write('HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n') })
  const first = await gateway(t, async () => await never.open(), { signal: before.signal })
  t.match(await ask(first.port), { statusCode: 502 })
  await t.rejects(first.results[0]!, { message: 'too late' })

  const after = new AbortController()
  const endless = await rawUpstream(t, socket => { socket.write(Buffer.concat([Buffer.from(HEAD), frame(event(1))])) })
  const second = await gateway(t, async () => await endless.open(), { signal: after.signal })
  const request = get({ port: second.port, host: '127.0.0.1', agent: false })
  const [response] = await once(request, 'response') as [IncomingMessage]
  after.abort(new DOMException('slow', 'TimeoutError'))
  t.match((await collect(response)).body.toString(), /^data: 1\n\ndata: \{"error":.*"code":"upstream_broken"/)
  t.match(await second.results[0], { outcome: 'upstream_failed', error: { message: 'slow' } })
})

t.test('a client that leaves ends the upstream at once', async t => {
  const endless = await rawUpstream(t, socket => { socket.write(Buffer.concat([Buffer.from(HEAD), frame(event(1))])) })
  const first = await gateway(t, async () => await endless.open())
  const request = get({ port: first.port, host: '127.0.0.1', agent: false })
  request.on('error', () => {})
  const [response] = await once(request, 'response') as [IncomingMessage]
  response.on('error', () => {})
  const closed = once(await endless.socket(), 'close')
  request.destroy()
  await closed
  t.match(await first.results[0], { outcome: /client_gone|upstream_failed/ })

  const silent = await rawUpstream(t, socket => { socket.write(HEAD) })
  const second = await gateway(t, async () => await silent.open())
  const impatient = get({ port: second.port, host: '127.0.0.1', agent: false })
  impatient.on('error', () => {})
  const socket = await silent.socket()
  await until(() => second.results.length > 0, 'the relay waits for the first byte')
  impatient.destroy()
  await once(socket, 'close')
  await t.rejects(second.results[0]!, { message: 'client gone' })
})

t.test('a client that leaves before a whole answer has gone out ends the relay', async t => {
  const whole = await rawUpstream(t, socket => { socket.write(Buffer.concat([Buffer.from(HEAD), frame(event(1))])) })
  const { port, results } = await gateway(t, async reply => {
    const { raw } = reply
    const write = raw.write.bind(raw) as (chunk: Buffer) => boolean
    // As when the client reads nothing.
    raw.write = ((chunk: Buffer) => { write(chunk); return false }) as typeof raw.write
    return await whole.open()
  })
  const request = get({ port, host: '127.0.0.1', agent: false })
  request.on('error', () => {})
  const [response] = await once(request, 'response') as [IncomingMessage]
  response.on('error', () => {})
  const socket = await whole.socket()
  socket.write(Buffer.concat([frame(event(2)), Buffer.from('0\r\n\r\n')]))
  request.destroy()
  await until(() => results.length > 0, 'the relay runs')
  t.match(await results[0], { outcome: /client_gone|upstream_failed/ })
})

t.test('a slow client stops the upstream, and loses nothing', async t => {
  const chunk = Buffer.from(event('z'.repeat(64 * 1024 - 10)))
  for (const kind of ['event stream', 'short events', 'known length'] as const) {
    const piece = kind === 'short events' ? Buffer.from(event('z'.repeat(1000))) : chunk
    // More than any kernel's socket buffers take. A stream ends with the piece at which it was found to stall.
    let count = Math.ceil((256 << 20) / piece.length)
    let sent = 0
    const upstream = await rawUpstream(t, socket => {
      socket.write(kind === 'known length' ? `HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ${count * piece.length}\r\n\r\n` : HEAD)
      const framed = kind === 'known length' ? piece : frame(piece)
      const go = (): void => {
        while (sent < count) {
          sent++
          if (!socket.write(framed)) {
            socket.once('drain', go)
            return
          }
        }
        if (kind !== 'known length') socket.write('0\r\n\r\n')
      }
      go()
    })
    const { port, results } = await gateway(t, async () => await upstream.open())
    const request = get({ port, host: '127.0.0.1', agent: false })
    const [response] = await once(request, 'response') as [IncomingMessage]
    response.pause()
    let before = -1
    await until(async () => {
      const still = sent === before
      before = sent
      await new Promise(resolve => setTimeout(resolve, 100))
      return still
    }, 'the upstream stalls')
    t.ok(sent < count, `${kind}: stalled after ${sent} of ${count} chunks`)
    if (kind !== 'known length') count = sent + 1
    let bytes = 0
    let wrong = 0
    for await (const data of response as AsyncIterable<Buffer>) {
      if (!isAt(data, piece, bytes % piece.length)) wrong++
      bytes += data.length
    }
    t.equal(wrong, 0, 'every byte in its place')
    t.equal(bytes, count * piece.length)
    t.match(await results[0], { outcome: 'complete' })
  }
})

/** Whether `data` is what a repetition of `piece` holds from `offset` on. */
function isAt (data: Buffer, piece: Buffer, offset: number): boolean {
  for (let at = 0; at < data.length;) {
    const length = Math.min(data.length - at, piece.length - offset)
    if (data.compare(piece, offset, offset + length, at, at + length) !== 0) return false
    at += length
    offset = 0
  }
  return true
}

t.test('headers of the hop stay behind, those of the answer and the reply arrive', async t => {
  const upstream = scripted([Buffer.from('{"a":1}')], {
    'content-type': 'application/json',
    'content-length': '7',
    connection: 'keep-alive, X-Hop',
    'keep-alive': 'timeout=5',
    'x-hop': '1',
    'proxy-authenticate': 'Basic',
    te: 'x',
    upgrade: 'h2c',
    server: 'uvicorn',
    date: 'yesterday',
    'access-control-allow-origin': '*',
    'set-cookie': ['a=1', 'b=2'],
    'x-request-id': 'r1',
    'x-own': 'theirs'
  })
  const { port } = await gateway(t, reply => { reply.header('x-own', 'ours').header('x-rate', '5'); return upstream }, { headers: { 'x-epd-plan': 'pd' } },
    async app => { await app.register(cors, { origin: 'https://mine' }) })
  const { headers, body } = await ask(port, { headers: { origin: 'https://mine' } })
  t.match(headers, { 'content-type': 'application/json', 'content-length': '7', 'x-request-id': 'r1', 'x-own': 'ours', 'x-rate': '5', 'x-epd-plan': 'pd', 'access-control-allow-origin': 'https://mine' })
  for (const name of ['x-hop', 'proxy-authenticate', 'te', 'upgrade', 'server', 'set-cookie', 'transfer-encoding']) t.notOk(headers[name], name)
  t.not(headers.date, 'yesterday')
  t.equal(body.toString(), '{"a":1}')
})

t.test('event streams carry what proxies and browsers need to know', async t => {
  const { port } = await gateway(t, () => scripted([Buffer.from(DONE)], { ...SSE, 'content-length': '14', 'transfer-encoding': 'chunked' }))
  const { headers, body } = await ask(port)
  t.match(headers, { 'content-type': SSE['content-type'], 'cache-control': 'no-cache', 'x-accel-buffering': 'no', 'transfer-encoding': 'chunked' })
  t.equal(body.toString(), DONE)
})

t.test('a connection goes on after a stream, also when requests are pipelined', async t => {
  const bytes = events('\n')
  const kinds = [() => scripted(cut(bytes, [10, 60, 61, 200]), SSE), () => scripted([Buffer.from('{"a":"\u00e4"}')], { 'content-type': 'application/json', 'content-length': '10' })]
  let n = 0
  const { port } = await gateway(t, () => kinds[n++ % 2]!())
  const socket = connect(port, '127.0.0.1')
  t.teardown(() => socket.destroy())
  let text = ''
  socket.setEncoding('latin1').on('data', (data: string) => { text += data })
  socket.write('GET / HTTP/1.1\r\nhost: x\r\n\r\n'.repeat(4))
  await until(() => text.split('HTTP/1.1 200 OK').length === 5 && text.endsWith('}'), 'four answers')
  const bodies = text.split('HTTP/1.1 200 OK').slice(1).map(answer => answer.slice(answer.indexOf('\r\n\r\n') + 4))
  for (const i of [0, 2]) {
    t.equal(unchunk(bodies[i]!), bytes.toString('latin1'))
    t.equal(bodies[i + 1], Buffer.from('{"a":"\u00e4"}').toString('latin1'))
  }
})

t.test('works with inject, HTTP/1.0, a replaced write and HTTP/2', async t => {
  const bytes = events('\n')
  const make = (): UpstreamResponse => scripted(cut(bytes, [10, 60, 61, 200]), SSE)
  const { app, port } = await gateway(t, make)
  t.equal((await app.inject('/')).body, bytes.toString(), 'inject')

  const socket = connect(port, '127.0.0.1')
  socket.write('GET / HTTP/1.0\r\n\r\n')
  let text = ''
  socket.setEncoding('utf8').on('data', (data: string) => { text += data })
  await once(socket, 'end')
  t.equal(text.slice(text.indexOf('\r\n\r\n') + 4), bytes.toString(), 'HTTP/1.0')

  let seen = ''
  const patched = await gateway(t, reply => {
    const { raw } = reply
    const write = raw.write.bind(raw) as (chunk: Buffer) => boolean
    raw.write = ((chunk: Buffer) => { seen += chunk.toString(); return write(chunk) }) as typeof raw.write
    return make()
  })
  t.equal((await ask(patched.port)).body.toString(), bytes.toString())
  t.equal(seen, bytes.toString(), 'who has replaced write sees all')

  const http2 = await gateway(t, make, { http2: true })
  const client = connectHttp2(`http://127.0.0.1:${http2.port}`)
  t.teardown(() => client.close())
  let body = ''
  const stream = client.request({ ':path': '/' })
  for await (const chunk of stream) body += String(chunk)
  t.equal(body, bytes.toString(), 'HTTP/2')
})

t.test('the end of an answer has usage and finish reason, or nothing', async t => {
  let upstream!: UpstreamResponse
  const { port, results } = await gateway(t, () => upstream)
  const told = async (...texts: string[]): Promise<Closing> => {
    upstream = scripted(texts.map(text => Buffer.from(text)), { 'content-type': 'application/json' })
    await ask(port)
    return (await results.at(-1)!).closing()
  }
  const usage = { promptTokens: 1, completionTokens: 2, totalTokens: undefined, cachedTokens: undefined }
  t.strictSame((await told('{"choices":[{"finish_reason" : "length"}],"usage" :\n{"prompt_tokens":1,"completion_tokens":2,"x":{"y":{}}}}')).usage, usage)
  t.match(await told('{"finish_reason":"tool_calls","a":"\\"usage\\":{\\"prompt_tokens\\":9}"}'), { finishReason: 'tool_calls', usage: undefined })
  t.match(await told('{"usage":{"prompt_tokens":1,"completion_tokens":2}', ',"big":"', 'x'.repeat(100), '"}'), { usage })
  for (const text of ['', '{}', '{"usage":null,"finish_reason":null}', '{"usage":{"prompt_tokens":', '{"usage":{x}}', 'usage']) t.match(await told(text), { usage: undefined, finishReason: undefined })
  t.match(await told(event({ choices: [{ finish_reason: 'stop' }], usage: null }), event({ choices: [{ finish_reason: null }], usage: { prompt_tokens: '1' } }), DONE), { finishReason: 'stop', usage: { promptTokens: undefined } })
})

t.test('a completion that came whole keeps its bytes, says the same at its end, and frees its connection', async t => {
  const cases: Array<[answer: object, closing: Closing]> = [
    [{ choices: [{ finish_reason: 'length' }], usage: { prompt_tokens: 1, completion_tokens: 2, prompt_tokens_details: { cached_tokens: 1 } } }, { finishReason: 'length', usage: { promptTokens: 1, completionTokens: 2, totalTokens: undefined, cachedTokens: 1 } }],
    [{ choices: [{ text: '\u00e4' }, { finish_reason: 'stop' }], usage: null }, { finishReason: 'stop', usage: undefined }],
    [{ choices: [{ finish_reason: null }, null], usage: 7 }, { finishReason: undefined, usage: undefined }],
    [{ choices: [{ finish_reason: 3 }], usage: { prompt_tokens: '1' } }, { finishReason: undefined, usage: { promptTokens: undefined, completionTokens: undefined, totalTokens: undefined, cachedTokens: undefined } }]
  ]
  let connections = 0
  let text = ''
  const server = createServer((_request, response) => { response.writeHead(200, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) }).end(text) })
  server.on('connection', () => { connections++ })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const dispatcher = new Agent()
  t.teardown(async () => { await dispatcher.destroy(); server.close() })
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  for (const [answer, closing] of cases) {
    text = JSON.stringify(answer)
    const limit = new TimeLimit(0)
    const log = { debug () {}, info () {}, warn () {}, error () {} }
    const response = await postStream({ id: url, url, role: 'hybrid' }, { path: '/v1/chat/completions', body: [Buffer.from('{}')] }, { signal: limit, headers: {}, dispatcher, log })
    const { body, delivered } = await beginAnswer(url, response, limit, 60_000)
    t.equal(String(body), text)
    t.strictSame((await delivered).closing(), closing)
    // undici's pool opens another connection for a request that comes before the first has been put back.
    await new Promise(setImmediate)
  }
  t.equal(connections, 1)
})

t.test('a client is gone when it leaves, and only then', async t => {
  const seen: Array<{ gone: number, response: ServerResponse }> = []
  const watch = (response: ServerResponse): { gone: number, response: ServerResponse } => {
    const one = { gone: 0, response }
    onClientGone(response, () => { one.gone++ })
    return one
  }
  const app = Fastify({ forceCloseConnections: true })
  t.teardown(() => app.close())
  app.post('/', async (request, reply) => {
    seen.push(watch(reply.raw))
    if ((request.body as { wait: boolean }).wait) await once(reply.raw, 'close')
    else await new Promise(resolve => setTimeout(resolve, 20))
    return { ok: true }
  })
  await app.listen({ port: 0, host: '127.0.0.1' })
  const post = (body: unknown): ReturnType<typeof httpRequest> => {
    const request = httpRequest({ port: (app.server.address() as AddressInfo).port, host: '127.0.0.1', method: 'POST', agent: false, headers: { 'content-type': 'application/json' } })
    request.on('error', () => {})
    request.end(JSON.stringify(body))
    return request
  }
  const [response] = await once(post({ wait: false }), 'response') as [IncomingMessage]
  await collect(response)
  await until(() => seen[0]!.response.destroyed || seen[0]!.response.writableFinished, 'the answer is out')
  t.equal(seen[0]!.gone, 0, 'a request whose body was read is not an abort (fastify#6725)')

  const request = post({ wait: true })
  await until(() => seen.length === 2, 'the handler runs')
  request.destroy()
  await until(() => seen[1]!.gone > 0, 'it is gone')

  const socket = connect((app.server.address() as AddressInfo).port, '127.0.0.1')
  socket.write('POST / HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{"wait":true}'.repeat(2))
  await until(() => seen.length === 4, 'both handlers run')
  socket.destroy()
  await until(() => seen[2]!.gone > 0 && seen[3]!.gone > 0, 'that of a request behind another aborts, too')
  t.equal(watch(seen[3]!.response).gone, 1, 'also when that was before')

  const server = createServer((_request, response) => {
    response.destroy()
    t.equal(watch(response).gone, 1, 'also when that was before')
  })
  t.teardown(() => server.close())
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  await t.rejects(ask((server.address() as AddressInfo).port))
})
