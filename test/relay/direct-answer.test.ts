/** An event stream goes straight into a client's response, until that has to wait or somebody else reads along. */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { request as httpRequest, type IncomingMessage } from 'node:http'
import { connect, type AddressInfo } from 'node:net'
import { PassThrough, Readable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import { createGzip, gunzipSync } from 'node:zlib'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyReply } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import { TimeLimit } from '../../adapters/abort.ts'
import type { UpstreamResponse } from '../../adapters/adapter.ts'
import { deliver } from '../../plugin/http/client.ts'
import { AnswerStream } from '../../plugin/pipeline/answer-stream.ts'
import { beginAnswer, type Answer } from '../../plugin/pipeline/index.ts'
import { Random } from '../body/random-json.ts'
import { until } from '../helper/until.ts'
import { cut, event, frame, rawUpstream, scripted, SSE, unchunk } from './upstreams.ts'

const DONE = 'data: [DONE]\n\n'
const REQUEST = 'GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n'
/** For events of any length. */
const TEXT = Buffer.from(Array.from({ length: 10_000 }, (_, i) => i.toString(36)).join(''))

interface Gateway { app: FastifyInstance, port: number, answers: Answer[] }
interface Client { response: IncomingMessage, text: string, ended: Promise<void> }

async function gateway (t: Test, open: () => UpstreamResponse | Promise<UpstreamResponse>, setUp?: (app: FastifyInstance) => void, prepare?: (reply: FastifyReply) => void): Promise<Gateway> {
  const app = Fastify({ forceCloseConnections: true }) as FastifyInstance
  t.teardown(() => app.close())
  setUp?.(app)
  const answers: Answer[] = []
  app.get('/', async (_request, reply) => {
    const answer = await beginAnswer('http://node', await open(), new TimeLimit(0), 60_000)
    answers.push(answer)
    prepare?.(reply)
    deliver(answer, reply, {})
    return reply
  })
  await app.listen({ port: 0, host: '127.0.0.1' })
  return { app, port: (app.server.address() as AddressInfo).port, answers }
}

/** What has come so far. */
async function ask (port: number): Promise<Client> {
  const request = httpRequest({ port, host: '127.0.0.1', agent: false })
  request.end()
  const [response] = await once(request, 'response') as [IncomingMessage]
  const client: Client = { response, text: '', ended: once(response, 'end').then(() => {}) }
  response.setEncoding('utf8').on('data', (text: string) => { client.text += text })
  client.ended.catch(() => {})
  return client
}

/** An upstream that a test feeds by hand. */
function byHand (...begun: string[]): { upstream: UpstreamResponse, body: Readable } {
  const body = new Readable({ read () {} })
  for (const text of begun) body.push(text)
  return { upstream: { statusCode: 200, headers: SSE, body }, body }
}

/** Events of choices, then `[DONE]`, in pieces as they come. */
function many (random: Random, count = 100): { bytes: Buffer, pieces: Buffer[] } {
  const pieces = Array.from({ length: count }, (_, i) => Buffer.from(event({ i, choices: [{ delta: { content: 'é'.repeat(random.below(random.below(10) === 0 ? 15_000 : 100)) } }] })))
  pieces.push(Buffer.from(DONE))
  return { bytes: Buffer.concat(pieces), pieces }
}

/** Texts of megabytes are not printed. */
function same (t: Test, seen: string | Buffer, wanted: Buffer, what: string): void {
  const bytes = Buffer.from(seen as string)
  t.equal(bytes.length, wanted.length, what)
  t.ok(bytes.equals(wanted), what)
}

t.test('a client that reads slowly stops the upstream, and gets every byte in order', async t => {
  const AT_LEAST = 30 << 20
  // More than any kernel's socket buffers take.
  const AT_MOST = 256 << 20
  const LONGEST = 60_000
  const random = new Random(11)
  for (const [kind, length] of Object.entries({
    short: () => random.below(2_000),
    long: () => 20_000 + random.below(LONGEST - 20_000),
    mixed: () => random.below(random.below(8) === 0 ? LONGEST : 1_000)
  })) {
    const sent = createHash('sha256')
    // The first event is on its way alone, so that the next ones go straight.
    const first = Buffer.from('data: 0\n\n')
    sent.update(first)
    let [taken, stalled] = [first.length, false]
    let go!: () => void
    const begun = new Promise<void>(resolve => { go = resolve })
    const body = new Readable({
      async read () {
        await begun
        setImmediate(() => {
          for (let more = true; more;) {
            const last = taken > (stalled ? AT_LEAST : AT_MOST)
            const size = length()
            const at = random.below(TEXT.length)
            let text = TEXT.subarray(at, at + size)
            while (text.length < size) text = Buffer.concat([text, TEXT.subarray(0, size - text.length)])
            const bytes = Buffer.concat([Buffer.from('data: '), text, Buffer.from(last ? `\n\n${DONE}` : '\n\n')])
            sent.update(bytes)
            taken += bytes.length
            more = this.push(bytes) && !last
            if (last) this.push(null)
          }
        })
      }
    })
    body.push(first)
    let reply: FastifyReply | undefined
    const { port, answers } = await gateway(t, () => ({ statusCode: 200, headers: SSE, body }), undefined, one => { reply = one })
    const socket = connect(port, '127.0.0.1').pause()
    t.teardown(() => socket.destroy())
    socket.write(REQUEST)
    await until(() => reply?.raw.headersSent, 'the first event is on its way')
    go()
    let before = -1
    await until(() => {
      const still = body.isPaused() && taken === before
      before = taken
      return still || body.readableEnded
    }, 'the upstream is paused')
    t.ok(body.isPaused(), `${kind}: paused after ${taken} bytes`)
    t.ok(taken < AT_MOST, `${kind}: the upstream gives no more than fits`)
    const held = (answers[0]!.body as Readable).readableLength + reply!.raw.writableLength + reply!.raw.socket!.writableLength
    t.ok(held < 4 * LONGEST + 64 * 1024, `${kind}: ${held} bytes wait in the gateway`)
    stalled = true
    const parts: Buffer[] = []
    for await (const bytes of socket) parts.push(bytes as Buffer)
    const text = Buffer.concat(parts).toString('latin1')
    const seen = Buffer.from(unchunk(text.slice(text.indexOf('\r\n\r\n') + 4)), 'latin1')
    t.equal(seen.length, taken, `${kind}: every byte`)
    t.equal(createHash('sha256').update(seen).digest('hex'), sent.digest('hex'), `${kind}: in order`)
    t.ok(taken > AT_LEAST)
    t.match(await answers[0]!.delivered, { outcome: 'complete', how: 'unread', bytes: taken })
  }
})

t.test('a client that stops again and again gets every byte in order', async t => {
  const random = new Random(12)
  const { bytes, pieces } = many(random, 10_000)
  const { port, answers } = await gateway(t, () => scripted(pieces, SSE))
  const socket = connect(port, '127.0.0.1')
  t.teardown(() => socket.destroy())
  socket.write(REQUEST)
  const parts: Buffer[] = []
  for await (const part of socket) {
    parts.push(part as Buffer)
    for (let turns = random.below(20); turns > 0; turns--) await turn()
  }
  const text = Buffer.concat(parts).toString('latin1')
  same(t, Buffer.from(unchunk(text.slice(text.indexOf('\r\n\r\n') + 4)), 'latin1'), bytes, 'the bytes')
  t.match(await answers[0]!.delivered, { outcome: 'complete' })
})

t.test('a hook that listens to the payload sees every byte, and the client gets every byte once', async t => {
  const { bytes, pieces } = many(new Random(13))
  for (const kind of ['with a callback', 'with a promise'] as const) {
    const seen: Buffer[] = []
    const { port, answers } = await gateway(t, () => scripted(pieces, SSE), app => {
      const listen = (payload: unknown): void => { (payload as Readable).on('data', (bytes: Buffer) => { seen.push(bytes) }) }
      if (kind === 'with a callback') app.addHook('onSend', (_request, _reply, payload, done) => { listen(payload); done(null, payload) })
      else app.addHook('onSend', async (_request, _reply, payload) => { listen(payload); return payload })
    })
    const client = await ask(port)
    await client.ended
    same(t, client.text, bytes, `${kind}: the client`)
    same(t, Buffer.concat(seen), bytes, `${kind}: the listener`)
    t.match(await answers[0]!.delivered, { outcome: 'complete' })
  }
})

t.test('a hook that pipes the payload elsewhere too gets every byte there, and the client gets every byte once', async t => {
  const { bytes, pieces } = many(new Random(14))
  const seen: Buffer[] = []
  const aside = new PassThrough().on('data', (bytes: Buffer) => { seen.push(bytes) })
  const { port } = await gateway(t, () => scripted(pieces, SSE), app => {
    app.addHook('onSend', async (_request, _reply, payload) => {
      (payload as Readable).pipe(aside)
      return payload
    })
  })
  const ended = once(aside, 'end')
  const client = await ask(port)
  await Promise.all([client.ended, ended])
  same(t, client.text, bytes, 'the client')
  same(t, Buffer.concat(seen), bytes, 'the other')
})

t.test('who begins to listen in the middle of a stream sees the rest, and the client gets every byte once, in order', async t => {
  const pieces = Array.from({ length: 40 }, (_, i) => event({ i, text: 'é'.repeat(i) }))
  for (const kind of ['data', 'readable', 'pipe'] as const) {
    const { upstream, body } = byHand(pieces[0]!)
    const { port, answers } = await gateway(t, () => upstream)
    const client = await ask(port)
    for (const piece of pieces.slice(1, 20)) {
      body.push(piece)
      await turn()
    }
    await until(() => client.text === pieces.slice(0, 20).join(''), 'the first half is there')
    const payload = answers[0]!.body as Readable
    let seen = ''
    if (kind === 'data') payload.on('data', (bytes: Buffer) => { seen += String(bytes) })
    else if (kind === 'pipe') payload.pipe(new PassThrough()).on('data', (bytes: Buffer) => { seen += String(bytes) })
    else payload.on('readable', () => { for (let bytes; (bytes = payload.read() as Buffer | null) !== null;) seen += String(bytes) })
    for (const piece of pieces.slice(20)) {
      body.push(piece)
      if (piece.length % 3 > 0) await turn()
    }
    body.push(null)
    await client.ended
    t.equal(client.text, pieces.join(''), kind)
    await until(() => seen.length === pieces.slice(20).join('').length, 'the listener has the rest')
    t.equal(seen, pieces.slice(20).join(''), kind)
    t.match(await answers[0]!.delivered, { outcome: 'complete' })
  }
})

t.test('a listener that comes and goes changes nothing for the client', async t => {
  const pieces = Array.from({ length: 30 }, (_, i) => event({ i }))
  const { upstream, body } = byHand(pieces[0]!)
  const { port, answers } = await gateway(t, () => upstream)
  const client = await ask(port)
  const payload = answers[0]!.body as Readable
  const listener = (): void => {}
  for (const [i, piece] of pieces.slice(1).entries()) {
    if (i === 10) payload.on('data', listener)
    if (i === 20) payload.off('data', listener)
    body.push(piece)
    await turn()
  }
  body.push(null)
  await client.ended
  t.equal(client.text, pieces.join(''))
  t.match(await answers[0]!.delivered, { outcome: 'complete' })
})

t.test('a hook may pipe the payload into another stream, which becomes the answer', async t => {
  const { bytes, pieces } = many(new Random(15))
  for (const kind of ['gzip', 'PassThrough'] as const) {
    const { port, answers } = await gateway(t, () => scripted(pieces, SSE), app => {
      app.addHook('onSend', async (_request, reply, payload) => {
        if (kind === 'PassThrough') return (payload as Readable).pipe(new PassThrough())
        reply.header('content-encoding', 'gzip')
        return (payload as Readable).pipe(createGzip())
      })
    })
    const request = httpRequest({ port, host: '127.0.0.1', agent: false })
    request.end()
    const [response] = await once(request, 'response') as [IncomingMessage]
    const parts: Buffer[] = []
    for await (const part of response) parts.push(part as Buffer)
    const seen = Buffer.concat(parts)
    same(t, kind === 'gzip' ? gunzipSync(seen) : seen, bytes, kind)
    t.match(await answers[0]!.delivered, { outcome: 'complete' })
  }
})

t.test('a client that leaves in the middle is gone, and its upstream is closed', async t => {
  const { upstream, body } = byHand('data: 1\n\n')
  const { port, answers } = await gateway(t, () => upstream)
  const client = await ask(port)
  await turn()
  body.push('data: 2\n\n')
  await until(() => client.text === 'data: 1\n\ndata: 2\n\n', 'the events are there')
  client.response.on('error', () => {})
  client.response.destroy()
  t.match(await answers[0]!.delivered, { outcome: 'client_gone', statusCode: 200 })
  t.ok(body.destroyed)
})

t.test('a client that leaves while its upstream waits for it is gone, too', async t => {
  const { upstream, body } = byHand('data: 1\n\n')
  const { port, answers } = await gateway(t, () => upstream)
  const socket = connect(port, '127.0.0.1').pause()
  socket.write(REQUEST)
  await until(() => answers.length > 0, 'the answer is on its way')
  const one = event('x'.repeat(5_000))
  // More than any kernel's socket buffers take.
  for (let sent = 0; !body.isPaused() && sent < 256 << 20; sent += one.length) {
    await turn()
    body.push(one)
  }
  t.ok(body.isPaused(), 'the upstream is paused')
  socket.destroy()
  t.match(await answers[0]!.delivered, { outcome: 'client_gone' })
  t.ok(body.destroyed)
})

t.test('an upstream that breaks off in the middle leaves whole events and an error event', async t => {
  for (const half of ['', 'data: {"ha']) {
    const { upstream, body } = byHand('data: 1\n\n')
    const { port, answers } = await gateway(t, () => upstream)
    const client = await ask(port)
    body.push('data: 2\n\n' + half)
    await until(() => client.text === 'data: 1\n\ndata: 2\n\n', 'the events are there')
    body.destroy(new Error('gone away'))
    await client.ended
    t.match(client.text, /^data: 1\n\ndata: 2\n\ndata: \{"error":[^\n]*"code":"upstream_broken"[^\n]*\n\n$/)
    t.match(await answers[0]!.delivered, { outcome: 'upstream_failed', how: 'broken', error: { message: 'gone away' } })
  }
})

t.test('a stream that comes to its end is complete, and trailers of the reply arrive', async t => {
  const { bytes, pieces } = many(new Random(16))
  for (const trailer of [false, true]) {
    const { port, answers } = await gateway(t, () => scripted(pieces, SSE), undefined, reply => {
      if (trailer) reply.trailer('x-checked', async () => 'yes')
    })
    const client = await ask(port)
    await client.ended
    same(t, client.text, bytes, 'the bytes')
    t.strictSame({ ...client.response.trailers }, trailer ? { 'x-checked': 'yes' } : {})
    t.match(await answers[0]!.delivered, { outcome: 'complete', how: 'broken', statusCode: 200, bytes: bytes.length })
  }
})

t.test('bytes come as they were sent, wherever an upstream cuts its events', async t => {
  const random = new Random(17)
  let upstream!: UpstreamResponse
  const { port, answers } = await gateway(t, () => upstream)
  for (let i = 0; i < 40; i++) {
    const { bytes } = many(random, 20)
    const places = Array.from({ length: random.below(200) }, () => random.below(bytes.length))
    upstream = scripted(cut(bytes, places), SSE)
    const client = await ask(port)
    await client.ended
    if (client.text !== bytes.toString()) same(t, client.text, bytes, `cut at ${places.join()}`)
    t.match(await answers.at(-1)!.delivered, { outcome: 'complete', bytes: bytes.length })
  }
})

t.test('what waits before a hook lets the answer go comes in order, and nothing is lost', async t => {
  const { bytes, pieces } = many(new Random(18), 3_000)
  const node = await rawUpstream(t, socket => {
    socket.write('HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n')
    for (const piece of pieces) socket.write(frame(piece))
    socket.write('0\r\n\r\n')
  })
  const { port, answers } = await gateway(t, async () => await node.open(), app => {
    app.addHook('onSend', async (_request, _reply, payload) => {
      if (payload instanceof AnswerStream) await until(() => payload.readableLength > 64 * 1024, 'the node has to wait')
      return payload
    })
  })
  const client = await ask(port)
  await client.ended
  same(t, client.text, bytes, 'the bytes')
  t.match(await answers[0]!.delivered, { outcome: 'complete' })
})

/** Like that of undici, it hands out what it has while it is told to go on; its end comes at once, or a turn later. */
function atOnce (begun: Buffer, rest: Buffer, ends: boolean): UpstreamResponse {
  let said = false
  let sink!: { data (chunk: Buffer): void, end (): void }
  const upstream = {
    statusCode: 200,
    headers: SSE,
    body: Readable.from([]),
    flowing: true,
    hold () {},
    pause () {},
    close () {},
    flow (to: typeof sink) {
      sink = to
      sink.data(begun)
    },
    resume () {
      if (said) return
      said = true
      sink.data(rest)
      if (ends) sink.end()
      else setImmediate(() => { sink.end() })
    }
  }
  return upstream
}

t.test('an upstream that says its last as soon as it may go on loses nothing', async t => {
  const begun = Buffer.from(event({ choices: [{ delta: { content: 'x'.repeat(100_000) } }] }))
  const bytes = Buffer.concat([begun, Buffer.from(DONE)])
  for (const ends of [true, false]) {
    const what = ends ? 'with its end' : 'its end comes later'
    const { app, port, answers } = await gateway(t, () => atOnce(begun, Buffer.from(DONE), ends))
    const client = await ask(port)
    await client.ended
    same(t, client.text, bytes, what)
    t.match(await answers[0]!.delivered, { outcome: 'complete' })

    same(t, (await app.inject('/')).rawPayload, bytes, `${what}, by inject`)
    t.match(await answers[1]!.delivered, { outcome: 'complete' })

    const own = await gateway(t, () => atOnce(begun, Buffer.from(DONE), ends), undefined, ({ raw }) => {
      const write = raw.write.bind(raw) as (chunk: Buffer) => boolean
      raw.write = (chunk: Buffer) => {
        write(chunk)
        return true
      }
    })
    const other = await ask(own.port)
    await other.ended
    same(t, other.text, bytes, `${what}, by a write that never waits`)
    t.match(await own.answers[0]!.delivered, { outcome: 'complete' })
  }
})
