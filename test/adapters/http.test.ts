import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { once } from 'node:events'
import { createServer as createNetServer, type AddressInfo, type Socket } from 'node:net'
import t from 'tap'
import type { Dispatcher } from 'undici'
import { AdapterError, type UpstreamResponse } from '../../adapters/adapter.ts'
import { postStream, send, targetOf } from '../../adapters/http.ts'
import { statusOf } from '../../adapters/http/error-shape.ts'
import { requestJson, requestOk } from '../../adapters/http/json.ts'
import { retryAfterOf } from '../../adapters/http/failures.ts'
import { bytesOf, callWith, dispatcherFor, nodeAt, textOf } from '../helper/adapter-call.ts'
import { seeded } from '../helper/random.ts'
import { until } from '../helper/until.ts'

type Handler = (request: IncomingMessage, response: ServerResponse, body: Buffer) => void

interface Upstream {
  readonly url: string
  readonly sockets: Set<Socket>
  opened: number
}

type Teardown = Pick<typeof t, 'teardown'>

async function upstream (t: Teardown, handler: Handler): Promise<Upstream> {
  const server = createServer((request, response) => {
    const chunks: Buffer[] = []
    request.on('data', (chunk: Buffer) => chunks.push(chunk))
    request.on('end', () => { handler(request, response, Buffer.concat(chunks)) })
    request.on('error', () => {})
  })
  t.teardown(async () => {
    server.closeAllConnections()
    server.close()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const result: Upstream = { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, sockets: new Set(), opened: 0 }
  server.on('connection', socket => {
    result.opened++
    result.sockets.add(socket)
    socket.on('close', () => result.sockets.delete(socket))
  })
  return result
}

const POST = { path: '/v1/chat/completions', body: [Buffer.from('{}')] }
const EVENT = 'data: {"id":"1","object":"chat.completion.chunk","choices":[{"delta":{"content":"hi"}}]}\n\n'

t.test('a body of slices arrives whole, with its exact length and the node\'s key', async t => {
  const seen: Array<{ length: number, header: string | undefined, authorization: string | undefined, trace: unknown }> = []
  const { url } = await upstream(t, (request, response, body) => {
    seen.push({ length: body.length, header: request.headers['content-length'], authorization: request.headers.authorization, trace: request.headers.traceparent })
    response.end('{}')
  })
  const call = callWith(dispatcherFor(t), { headers: { traceparent: '00-x' } })
  const node = nodeAt(url, { apiKey: 'secret' })
  for (const size of [10, 200_000, 3_000_000]) {
    const body = [Buffer.alloc(5, 65), Buffer.alloc(size, 66), Buffer.alloc(7, 67)]
    await bytesOf(await postStream(node, { path: '/', body }, call))
  }
  t.same(seen.map(one => one.length), [22, 200_012, 3_000_012])
  t.same(seen.map(one => Number(one.header)), [22, 200_012, 3_000_012])
  t.match(seen[0], { authorization: 'Bearer secret', trace: '00-x' })
})

t.test('it resolves at the first event and leaves every byte in the body', async t => {
  let rest: (() => void) | undefined
  const { url } = await upstream(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(': ping\n\n')
    response.write(EVENT.slice(0, 20))
    setImmediate(() => response.write(EVENT.slice(20)))
    rest = () => { response.end('data: [DONE]\n\n') }
  })
  const response = await postStream(nodeAt(url), POST, callWith(dispatcherFor(t)))
  t.equal(response.statusCode, 200)
  rest!()
  t.equal(await textOf(response), ': ping\n\n' + EVENT + 'data: [DONE]\n\n')
})

/** Answers with these chunks, each by itself: on a socket some would be joined. */
function chunkDispatcher (chunks: readonly Buffer[]): Dispatcher {
  return {
    dispatch (_options: unknown, handler: Dispatcher.DispatchHandler) {
      const controller = { pause () {}, resume () {}, abort () {} } as unknown as Dispatcher.DispatchController
      handler.onRequestStart!(controller, {})
      setImmediate(() => {
        handler.onResponseStart!(controller, 200, { 'content-type': 'text/event-stream' })
        setImmediate(() => {
          for (const chunk of chunks) handler.onResponseData!(controller, chunk)
          handler.onResponseEnd!(controller, {})
        })
      })
      return true
    }
  } as unknown as Dispatcher
}

t.test('where a stream is cut changes nothing of its beginning', async t => {
  const below = seeded(15)
  const beginnings = ['', '\ufeff', ': alive\n\n', 'event: ping\ndata: {}\n\n', 'retry: 10\n\n', ': \u00e4\n: two\n\n']
  const preamble = 'data: {"choices": [],"prompt_filter_results":[]}\n\n'
  for (let round = 0; round < 200; round++) {
    const end = ['\n', '\r\n', '\r'][below(3)]!
    const alive = beginnings[below(6)]! + beginnings[2 + below(4)]!
    const answer = `${below(2) === 0 ? preamble : ''}event: x\ndata: {"choices":\ndata: [{"delta":{"content":"\u00e4${'x'.repeat(below(300))}"}}]}\n\ndata: [DONE]\n\n`
    const bytes = Buffer.from((alive + answer).replaceAll('\n', end))
    const chunks: Buffer[] = []
    const most = [1, 3, 50][below(3)]!
    for (let at = 0; at < bytes.length;) chunks.push(bytes.subarray(at, at += 1 + below(most)))
    let shown = ''
    const response = await postStream(nodeAt('http://127.0.0.1:1'), POST, callWith(chunkDispatcher(chunks), { onAlive: some => { shown += some.toString() } }))
    const expected = (alive + answer).replace('\ufeff', '').replaceAll('\n', end)
    const whole = shown + await textOf(response)
    if (whole !== expected || !shown.startsWith(alive.replace('\ufeff', '').replaceAll('\n', end).slice(0, -1))) {
      t.equal(whole, expected, `round ${round}`)
      t.fail(`shown ${JSON.stringify(shown)}`)
    }
  }
})

t.test('an error event in place of the first event is an error, by its code', async t => {
  const events: Array<[object, string, number]> = [
    [{ object: 'error', message: 'no such part', type: 'invalid_request_error', code: 400 }, 'REJECTED', 400],
    [{ message: 'too long', type: 'invalid_request_error', code: 'context_length_exceeded' }, 'REJECTED', 400],
    [{ message: 'full', code: 'busy' }, 'BUSY', 503],
    [{ message: 'slow down', code: 429 }, 'BUSY', 429],
    [{ message: 'out of memory', type: 'internal_error', code: 500 }, 'UNAVAILABLE', 500],
    [{ message: 'who knows' }, 'UNAVAILABLE', 500]
  ]
  let next = 0
  const { url } = await upstream(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(`data: ${JSON.stringify({ error: events[next++]![0] })}\n\ndata: [DONE]\n\n`)
  })
  const call = callWith(dispatcherFor(t))
  for (const [, code, status] of events) {
    const error = await postStream(nodeAt(url), POST, call).catch((error: unknown) => error)
    if (!AdapterError.is(error)) return t.fail('must fail')
    t.match(error, { code, node: url })
    t.equal(error.response?.statusCode, status)
  }
})

t.test('a good event that speaks of errors is good', async t => {
  const text = 'data: {"id":"error","choices":[{"delta":{}}]}\n\n'
  const { url } = await upstream(t, (_request, response) => { response.writeHead(200, { 'content-type': 'text/event-stream' }).end(text) })
  t.equal(await textOf(await postStream(nodeAt(url), POST, callWith(dispatcherFor(t)))), text)
})

t.test('statuses become codes, and a rejection keeps the answer as it came', async t => {
  const answers: Array<[number, Record<string, string>, string, object]> = [
    [400, { 'content-type': 'application/json' }, '{"error":{"message":"bad"}}', { code: 'REJECTED', response: { statusCode: 400, contentType: 'application/json', body: Buffer.from('{"error":{"message":"bad"}}') } }],
    [404, { 'content-type': 'text/html' }, '<h1>no</h1>', { code: 'REJECTED', response: { statusCode: 404, contentType: 'application/json', body: Buffer.from('{"error":{"message":"the model server answered 404","type":"invalid_request_error","code":null,"param":null}}') } }],
    [422, {}, '{"detail":[1]}', { code: 'REJECTED', message: /\[1\]/ }],
    [413, { 'content-type': 'text/plain' }, 'x'.repeat(300_000), { code: 'REJECTED', response: { statusCode: 413, contentType: 'application/json' } }],
    [401, {}, '{}', { code: 'UNAVAILABLE' }],
    [429, { 'retry-after': '7' }, '', { code: 'BUSY', retryAfter: 7 }],
    [503, {}, '', { code: 'BUSY', retryAfter: undefined }],
    [500, {}, '{"error":"boom"}', { code: 'UNAVAILABLE', message: /500: boom/ }],
    [302, { location: '/x' }, '', { code: 'UNAVAILABLE' }]
  ]
  let next = 0
  const { url, sockets } = await upstream(t, (_request, response) => {
    const [status, headers, body] = answers[next++]!
    response.writeHead(status, headers).end(body)
  })
  const call = callWith(dispatcherFor(t))
  for (const [, , , expected] of answers) t.match(await postStream(nodeAt(url), POST, call).catch((error: unknown) => error), expected)
  t.ok(sockets.size <= 2, 'sockets are used again, not leaked')
})

t.test('an error answer that never ends does not hold the call', { timeout: 20_000 }, async t => {
  const { url, sockets } = await upstream(t, (_request, response) => { response.writeHead(400).write('{"err') })
  t.match(await postStream(nodeAt(url), POST, callWith(dispatcherFor(t))).catch((error: unknown) => error), { code: 'REJECTED', response: { statusCode: 400 } })
  await until(() => sockets.size === 0, 'the socket is closed')
})

t.test('a node that refuses, resets or breaks off before the first event is UNAVAILABLE with the cause', async t => {
  const net = createNetServer(socket => { socket.resetAndDestroy() }).listen(0, '127.0.0.1')
  t.teardown(() => net.close())
  await once(net, 'listening')
  const resetting = `http://127.0.0.1:${(net.address() as AddressInfo).port}`
  const { url } = await upstream(t, (request, response) => {
    response.writeHead(200, { 'content-type': request.url === '/json' ? 'application/json' : 'text/event-stream' })
    if (request.url === '/empty') { response.end(); return }
    response.write(request.url === '/json' ? '' : EVENT.slice(0, 10))
    response.flushHeaders()
    setTimeout(() => response.socket?.resetAndDestroy(), 20)
  })
  const call = callWith(dispatcherFor(t))
  const fails = async (url: string, path: string): Promise<unknown> => await postStream(nodeAt(url), { ...POST, path }, call).catch((error: unknown) => error)
  t.match(await fails('http://127.0.0.1:9', '/'), { code: 'UNAVAILABLE', cause: { code: 'ECONNREFUSED' } })
  t.match(await fails(resetting, '/'), { code: 'UNAVAILABLE', cause: { code: /ECONNRESET|UND_ERR_SOCKET/ } })
  t.match(await fails(url, '/half'), { code: 'UNAVAILABLE' })
  t.match(await fails(url, '/json'), { code: 'UNAVAILABLE' })
  t.match(await fails(url, '/empty'), { code: 'UNAVAILABLE', message: /before its first event/ })
})

t.test('a break after the first event is an error of the body', async t => {
  const { url } = await upstream(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(EVENT, () => { setTimeout(() => response.socket?.resetAndDestroy(), 20) })
  })
  const response = await postStream(nodeAt(url), POST, callWith(dispatcherFor(t)))
  await t.rejects(textOf(response), { code: /ECONNRESET|UND_ERR_SOCKET/ })
})

t.test('the signal ends a call at every point, with its own reason, and closes the connection', async t => {
  const { url, sockets } = await upstream(t, (request, response) => {
    if (request.url === '/silent') return
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.flushHeaders()
    if (request.url === '/stream') response.write(EVENT)
  })
  const dispatcher = dispatcherFor(t)
  const reason = new Error('client left')
  for (const path of ['/silent', '/head']) {
    const controller = new AbortController()
    const pending = postStream(nodeAt(url), { ...POST, path }, callWith(dispatcher, { signal: controller.signal }))
    pending.catch(() => {})
    await until(() => sockets.size === 1, 'the request is there')
    controller.abort(reason)
    t.equal(await pending.catch((error: unknown) => error), reason)
    await until(() => sockets.size === 0, 'the socket is closed')
  }
  const controller = new AbortController()
  const call = callWith(dispatcher, { signal: controller.signal })
  const response = await postStream(nodeAt(url), { ...POST, path: '/stream' }, call)
  const piping = textOf(response)
  controller.abort(reason)
  t.equal(await piping.catch((error: unknown) => error), reason)
  await until(() => sockets.size === 0, 'the socket is closed')
  t.equal(await postStream(nodeAt(url), POST, call).catch((error: unknown) => error), reason, 'an aborted call is not sent')
  t.equal(sockets.size, 0)
})

t.test('a slow reader stops the upstream, and gets every byte in order', async t => {
  const total = 24 * 1024 * 1024
  const part = Buffer.alloc(64 * 1024)
  let sent = 0
  const { url } = await upstream(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/octet-stream' })
    const more = (): void => {
      while (sent < total) {
        part.writeUInt32LE(sent)
        sent += part.length
        if (!response.write(Buffer.from(part))) { response.once('drain', more); return }
      }
      response.end()
    }
    more()
  })
  const { body } = await postStream(nodeAt(url), { ...POST, path: '/v1/audio/speech' }, callWith(dispatcherFor(t)))
  let before = -1
  await until(() => { const still = sent === before; before = sent; return still && body.readableLength > 0 }, 'the upstream is blocked')
  t.ok(body.readableLength <= 192 * 1024, `only ${body.readableLength} bytes were read ahead`)
  t.ok(sent < total, `the upstream stopped at ${sent} of ${total}`)
  let got = 0
  for await (const chunk of body as AsyncIterable<Buffer>) got += chunk.length
  t.equal(got, total)
})

t.test('an answer that has come whole before its reader is still given up', async t => {
  const { url } = await upstream(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.cork()
    for (let i = 0; i < 3; i++) response.write(EVENT)
    response.end()
    response.uncork()
  })
  const reason = new Error('client left')
  const ways: Record<string, (response: UpstreamResponse, controller: AbortController) => void> = {
    'by its signal': (_response, controller) => { controller.abort(reason) },
    'by its reader': response => { response.body.destroy(reason) }
  }
  for (const [way, giveUp] of Object.entries(ways)) {
    const controller = new AbortController()
    const response = await postStream(nodeAt(url), POST, callWith(dispatcherFor(t), { signal: controller.signal }))
    giveUp(response, controller)
    t.equal(await textOf(response).catch((error: unknown) => error), reason, way)
  }
})

t.test('a kept connection that the server closes under an idempotent call is not an error', async t => {
  let count = 0
  const { url } = await upstream(t, (request, response) => {
    if (++count === 2) request.socket.resetAndDestroy()
    else response.end('{"n":1}')
  })
  const call = callWith(dispatcherFor(t))
  t.match(await requestJson(nodeAt(url), { method: 'GET', path: '/' }, call), { statusCode: 200 })
  t.match(await requestJson(nodeAt(url), { method: 'GET', path: '/', idempotent: true }, call), { body: { n: 1 } })
  t.equal(count, 3)
})

t.test('control calls are bounded in time and size', async t => {
  const { url } = await upstream(t, (request, response) => {
    if (request.url === '/silent') return
    if (request.url === '/drip') { response.write('{'); return }
    response.end(request.url === '/text' ? 'hello' : JSON.stringify('x'.repeat(5000)))
  })
  const call = callWith(dispatcherFor(t))
  await t.rejects(requestJson(nodeAt(url), { method: 'GET', path: '/silent', timeout: 50 }, call), { code: 'UNAVAILABLE', message: /within 50 ms/ })
  await t.rejects(requestJson(nodeAt(url), { method: 'GET', path: '/drip', timeout: 50 }, call), { code: 'UNAVAILABLE' })
  await t.rejects(requestJson(nodeAt(url), { method: 'GET', path: '/long', limit: 1000 }, call), { code: 'UNAVAILABLE', message: /longer than 1000/ })
  t.match(await requestJson(nodeAt(url), { method: 'GET', path: '/text' }, call), { statusCode: 200, body: undefined })
  await t.rejects(requestOk(nodeAt(url), { method: 'GET', path: '/text' }, call), { code: 'UNAVAILABLE', message: /not JSON/ })
})

t.test('an unwanted answer is closed', async t => {
  const { url, sockets } = await upstream(t, (_request, response) => { response.write('{"x":'); response.flushHeaders() })
  const response = await send(nodeAt(url), { method: 'GET', path: '/' }, callWith(dispatcherFor(t)))
  response.body.destroy()
  await until(() => sockets.size === 0, 'the socket is closed')
  await t.rejects(textOf(response))
})

t.test('a closed dispatcher is UNAVAILABLE, not a crash', async t => {
  const dispatcher = dispatcherFor(t)
  await dispatcher.destroy()
  await t.rejects(requestJson(nodeAt('http://127.0.0.1:9'), { method: 'GET', path: '/' }, callWith(dispatcher)), { code: 'UNAVAILABLE' })
})

t.test('small parts', async t => {
  t.equal(retryAfterOf('12'), 12)
  t.equal(retryAfterOf(['3', '4']), 3)
  t.equal(retryAfterOf('Thu, 01 Jan 1970 00:00:10 GMT', 4500), 6)
  t.equal(retryAfterOf('soon'), undefined)
})

t.test('the prefix of a node\'s paths: its URL\'s without slashes and the /v1 of OpenAI clients', async t => {
  const prefix = (url: string): string => targetOf(nodeAt(url)).prefix
  for (const url of ['http://h:1', 'http://h:1/', 'http://h:1/v1', 'http://h:1/v1/', 'https://api.example.com/v1//']) t.equal(prefix(url), '', url)
  for (const url of ['http://h:1/base/', 'http://h:1/base/v1']) t.equal(prefix(url), '/base', url)
  t.equal(prefix('http://h:1/xv1'), '/xv1')
})

t.test('a code stands for its status, and one named like a member of every object for none', async t => {
  t.equal(statusOf({ message: '', code: 'rate_limit_exceeded' }), 429)
  for (const code of [...Object.getOwnPropertyNames(Object.prototype), 'nothing']) t.equal(statusOf({ message: '', code, type: code }), 500, code)
})

t.test('interim answers are passed over; 100 Continue unasked, for which undici ends the connection, is named', async t => {
  let interim = 'HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n'
  const server = createNetServer(socket => {
    socket.once('data', () => { socket.end(`${interim}HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}`) }).on('error', () => {})
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.close() })
  await once(server, 'listening')
  const node = nodeAt(`http://127.0.0.1:${(server.address() as AddressInfo).port}`)
  const dispatcher = dispatcherFor(t)
  const answer = await send(node, { method: 'POST', ...POST }, callWith(dispatcher))
  t.equal(answer.statusCode, 200)
  t.equal(await textOf(answer), '{}')
  interim = 'HTTP/1.1 100 Continue\r\n\r\n'
  await t.rejects(send(node, { method: 'POST', ...POST }, callWith(dispatcher)), { code: 'UNAVAILABLE', how: 'cut', message: /sent 100 Continue without being asked/ })
})
