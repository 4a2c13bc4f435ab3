/** A stream that was accepted shows that it is alive, from its first moment on, and can still start again. */
import { createHash } from 'node:crypto'
import { Readable } from 'node:stream'
import t from 'tap'
import { LiveStream } from '../../plugin/pipeline/live-stream.ts'
import { post } from '../helper/fake-gateway.ts'
import { ask, CHUNK, COMPLETION, gatewayFor, json, modelServer, well, type TestGateway } from '../helper/model-server.ts'
import { until } from '../helper/until.ts'

const EVENTS = { 'content-type': 'text/event-stream' }
const DONE = 'data: [DONE]\n\n'

interface Stream { readonly status: number, readonly headers: Headers, text: string, readonly ended: Promise<void> }

/** What has come of a stream so far. */
async function open ({ url }: TestGateway, body: object = ask({ stream: true }), signal?: AbortSignal): Promise<Stream> {
  const response = await fetch(`${url}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), ...(signal === undefined ? {} : { signal }) })
  const stream = { status: response.status, headers: response.headers, text: '', ended: Promise.resolve() }
  stream.ended = (async () => {
    for await (const chunk of response.body!) stream.text += Buffer.from(chunk).toString()
  })()
  return stream
}

t.test('case 11: comments and pings of a server reach the client before its first event', async t => {
  for (const ping of [': ping\n\n', 'event: ping\ndata: {"type": "ping"}\n\n', ':\r\n\r\n', 'retry: 500\n\n']) {
    let first!: () => void
    const node = await modelServer(t, (_request, response) => {
      response.writeHead(200, { ...EVENTS, 'x-own': 'yes' })
      response.write(ping)
      first = () => { response.end(CHUNK + DONE) }
    })
    const stream = await open(await gatewayFor(t, [node]))
    await until(() => stream.text === ping, 'the ping is there')
    t.match([stream.status, stream.headers.get('content-type'), stream.headers.get('x-own'), stream.headers.get('x-epd-plan')], [200, 'text/event-stream', 'yes', 'pd'])
    first()
    await stream.ended
    t.equal(stream.text, ping + CHUNK + DONE, 'byte for byte')
  }
})

t.test('the gateway sends comments of its own, before the answer and in the middle of it', async t => {
  let go!: () => void
  const node = await modelServer(t, (_request, response) => {
    go = () => {
      response.writeHead(200, EVENTS).write(CHUNK)
      go = () => { response.end(CHUNK + DONE) }
    }
  })
  const stream = await open(await gatewayFor(t, [node], { sse: { keepAlive: 20 } }))
  await until(() => stream.text.startsWith(': keep-alive\n\n: keep-alive\n\n'), 'comments come before the head of the server has')
  go()
  await until(() => /Hello.*\n\n: keep-alive\n\n/s.test(stream.text), 'and between its events')
  go()
  await stream.ended
  t.equal(stream.text.replaceAll(': keep-alive\n\n', ''), CHUNK + CHUNK + DONE)
})

t.test('keepAlive 0: none of its own; and none where nothing is streamed', async t => {
  let go!: () => void
  const node = await modelServer(t, (request, response, body, server) => { go = () => { well(request, response, body, server) } })
  for (const [keepAlive, stream] of [[0, true], [20, false]] as const) {
    const gateway = await gatewayFor(t, [node], { sse: { keepAlive } })
    const asked = gateway.post(ask({ stream }))
    const before = node.asked
    await until(() => node.asked > before, 'it is asked')
    await new Promise(resolve => setTimeout(resolve, 60))
    go()
    t.notMatch((await asked).text, /keep-alive/)
  }
})

t.test('after a comment a request still starts again; what fails for good is an error event', async t => {
  let say: (() => void) | undefined
  const ill = await modelServer(t, (_request, response) => {
    response.writeHead(200, EVENTS).write(': ping\n\n')
    say = () => { response.end('data: {"error":{"message":"out of memory","code":500}}\n\n') }
  })
  const other = await modelServer(t, well)
  const both = await gatewayFor(t, [ill, other])
  const moved = await open(both)
  await until(() => moved.text !== '', 'the comment is there')
  say!()
  await moved.ended
  t.equal(moved.text, `: ping\n\n${CHUNK}${DONE}`)

  const alone = await gatewayFor(t, [ill])
  const failed = await open(alone)
  await until(() => failed.text !== '', 'the comment is there')
  say!()
  await failed.ended
  t.equal(failed.status, 200)
  t.match(JSON.parse(failed.text.replace(': ping\n\ndata: ', '')), { error: { message: 'out of memory', code: 500 } })
  t.equal(alone.app.epd.gateway.inFlight, 0)
})

t.test('without a sign of life an error keeps its status', async t => {
  const node = await modelServer(t, (_request, response) => { json(response, 429, { error: { message: 'slow down' } }) })
  t.equal((await open(await gatewayFor(t, [node]))).status, 429)
})

t.test('a client that leaves after a comment ends the request', async t => {
  let gone = false
  const node = await modelServer(t, (_request, response) => {
    response.writeHead(200, EVENTS).write(': ping\n\n')
    response.on('close', () => { gone = true })
  })
  const gateway = await gatewayFor(t, [node])
  const leave = new AbortController()
  const stream = await open(gateway, ask({ stream: true }), leave.signal)
  stream.ended.catch(() => {})
  await until(() => stream.text !== '', 'the comment is there')
  leave.abort()
  await until(() => gone && gateway.app.epd.gateway.inFlight === 0, 'nothing is left of it')
  t.match(gateway.app.epd.gateway.stats.requests(), [{ outcome: 'aborted' }])
})

t.test('what a client does not read of them stays bounded, in bytes and in what they are slices of', async t => {
  const live = new LiveStream()
  const much = Buffer.from(': ping\n\n'.repeat(100_000))
  for (let at = 0; at < much.length; at += 8) live.show(much.subarray(at, at + 8))
  const { readableLength } = live
  t.ok(readableLength <= live.readableHighWaterMark, `${readableLength} bytes wait`)
  t.not((live.read(8) as Buffer).buffer, much.buffer)
  const text = Readable.from([CHUNK + DONE], { objectMode: false })
  live.follow({ statusCode: 200, headers: EVENTS, body: text, delivered: new Promise(() => {}) })
  t.equal(Buffer.concat(await live.toArray()).toString(), ': ping\n\n'.repeat(readableLength / 8 - 1) + CHUNK + DONE, 'the answer follows whole')
})

t.test('a stream that fails after a comment is an error of its key, and none of a client that has left', async t => {
  const node = await modelServer(t, (_request, response) => {
    response.writeHead(200, EVENTS).write(': ping\n\n')
    response.end('data: {"error":{"message":"out of memory","code":500}}\n\n')
  })
  const hash = createHash('sha256').update('secret').digest('hex')
  const { url } = await gatewayFor(t, [node], { keys: [{ name: 'a', hash: `sha256:${hash}` }] })
  const answer = await post(`${url}/v1/chat/completions`, ask({ stream: true }), { headers: { authorization: 'Bearer secret' } })
  t.match(await answer.text(), /out of memory/)
  const counted = await until(async () => /^epd_key_requests_total.*/m.exec(await (await fetch(`${url}/metrics`)).text()), 'it is counted')
  t.match(counted[0], /epd_outcome="error"\} 1$/)
})

t.test('after a comment an answer that is not streamed is one event, however it is written and however long it is', async t => {
  const long = { ...COMPLETION, more: 'x'.repeat(1_200_000) }
  for (const text of [JSON.stringify(COMPLETION), JSON.stringify(COMPLETION, null, 2), JSON.stringify(COMPLETION, null, 2).replaceAll('\n', '\r\n'), JSON.stringify(long), JSON.stringify(long, null, 2).replaceAll('\n', '\r')]) {
    let go!: () => void
    const node = await modelServer(t, (_request, response) => { go = () => { response.writeHead(200, { 'content-type': 'application/json' }).end(text) } })
    const stream = await open(await gatewayFor(t, [node], { sse: { keepAlive: 20 } }))
    go()
    await stream.ended
    const events = stream.text.split('\n\n').filter(event => event !== '' && event !== ': keep-alive')
    t.match(events, [/^data: \{[^\r\n]*$/, 'data: [DONE]'])
    t.same(JSON.parse(events[0]!.slice('data: '.length)), JSON.parse(text))
  }
})

t.test('after a comment an answer that is neither is an error event, and not its node\'s fault', async t => {
  let go!: () => void
  const node = await modelServer(t, (_request, response) => { go = () => { response.writeHead(200, { 'content-type': 'audio/mpeg' }).end('ID3') } })
  const gateway = await gatewayFor(t, [node], { sse: { keepAlive: 20 } })
  const body = JSON.stringify({ model: 'm', input: 'x', stream: true })
  const answer = await fetch(`${gateway.url}/v1/audio/speech`, { method: 'POST', headers: { 'content-type': 'application/json' }, body })
  go()
  t.match((await answer.text()).replaceAll(': keep-alive\n\n', ''), /^data: \{"error":.*"upstream_failed".*\}\n\n$/)
  t.equal(gateway.app.epd.nodes.get(node.url)?.load.failing, false)
})
