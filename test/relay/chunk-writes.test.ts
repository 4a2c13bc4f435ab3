import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { connect, type AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import Fastify, { type FastifyReply } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import { TimeLimit } from '../../adapters/abort.ts'
import { deliver } from '../../plugin/http/client.ts'
import { writeChunk } from '../../plugin/pipeline/chunk-writes.ts'
import { beginAnswer } from '../../plugin/pipeline/index.ts'
import { Random } from '../body/random-json.ts'
import { cut, scripted, unchunk } from './upstreams.ts'

const random = new Random(7)
/** Of any bytes. A place taken twice makes an empty one, and node:http must not end the response with it. */
const CHUNKS = Array.from({ length: 200 }, (_, i) => Buffer.from(Array.from({ length: i % 50 === 49 ? 0 : 1 + random.below(random.below(10) === 0 ? 40_000 : 300) }, () => random.below(256))))
const ALL = Buffer.concat(CHUNKS)
const EVENTS = { 'content-type': 'text/event-stream' }
const DONE = 'data: [DONE]\n\n'

/** Most chunks are written in a turn of their own: node:http corks a connection until its turn is over. */
async function writeAll (response: ServerResponse): Promise<void> {
  for (const [i, chunk] of CHUNKS.entries()) {
    if (i === 0) response.write(chunk)
    else writeChunk(response, chunk)
    if (i % 4 > 0) await turn()
  }
  response.end()
}

async function serve (t: Test, prepare: (response: ServerResponse, request: IncomingMessage) => void, write: (response: ServerResponse) => Promise<void> = writeAll): Promise<number> {
  const server = createServer((request, response) => {
    prepare(response, request)
    write(response).catch((error: Error) => { response.destroy(error) })
  })
  t.teardown(() => { server.closeAllConnections(); server.close() })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return (server.address() as AddressInfo).port
}

async function post (port: number): Promise<Buffer> {
  return Buffer.from(await (await fetch(`http://127.0.0.1:${port}/`, { method: 'POST' })).arrayBuffer())
}

/** All that comes for these requests until the server closes the connection. */
async function exchange (port: number, requests: string): Promise<string> {
  const socket = connect(port, '127.0.0.1')
  socket.write(requests)
  let text = ''
  for await (const bytes of socket.setEncoding('latin1')) text += bytes as string
  return text
}

/** Counts the writes of the connection from now until the response is out. */
function countWrites (response: ServerResponse): () => number {
  const socket = response.socket!
  const { write } = socket
  let writes = 0
  socket.write = ((...args: Parameters<typeof write>) => { writes++; return write.apply(socket, args) }) as typeof write
  response.once('finish', () => { socket.write = write })
  return () => writes
}

/** Sends a node's event stream, through `beginAnswer` and `deliver`. */
async function send (reply: FastifyReply, body: Readable): Promise<void> {
  deliver(await beginAnswer('http://node', { statusCode: 200, headers: EVENTS, body }, new TimeLimit(0), 60_000), reply, {})
}

t.test('every byte comes, in order, whatever its chunk', async t => {
  const port = await serve(t, () => {})
  for (const bytes of await Promise.all([post(port), post(port), post(port)])) t.ok(bytes.equals(ALL))
})

t.test('a chunk is one write, but the first and a long one', async t => {
  const body = Buffer.from('data: é\n\n')
  const writes: number[] = []
  const port = await serve(t, () => {}, async response => {
    t.equal(writeChunk(response, body), true)
    await turn()
    const count = countWrites(response)
    for (const chunk of [body, body, Buffer.alloc(16 * 1024, 'x'), Buffer.alloc(16 * 1024 + 1, 'x'), body]) {
      const before = count()
      writeChunk(response, chunk)
      writes.push(count() - before)
      await turn()
    }
    response.end()
  })
  t.ok((await post(port)).equals(Buffer.concat([body, body, body, Buffer.alloc(32 * 1024 + 1, 'x'), body])))
  t.strictSame([...writes.slice(0, 3), writes[4]], [1, 1, 1, 1])
  t.ok(writes[3]! > 1)
})

t.test('a token of an event stream that is delivered is one write', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  app.post('/', async (_request, reply) => {
    const body = new Readable({ read () {} })
    body.push('data: 1\n\n')
    await send(reply, body)
    // The head is out then.
    await turn()
    const count = countWrites(reply.raw)
    for (const writes of [1, 2, 3]) {
      body.push('data: é\n\n')
      await turn()
      t.equal(count(), writes)
    }
    body.push(null)
    return reply
  })
  await app.listen({ port: 0, host: '127.0.0.1' })
  t.equal(String(await post((app.server.address() as AddressInfo).port)), 'data: 1\n\ndata: é\n\ndata: é\n\ndata: é\n\n')
})

t.test('it says so when the client does not keep up', async t => {
  for (const size of [1_000, 20_000]) {
    const chunk = Buffer.alloc(size, 'x')
    let [written, full] = [0, false]
    let stop!: () => void
    const stopped = new Promise<void>(resolve => { stop = resolve })
    const port = await serve(t, () => {}, async response => {
      // More than any kernel's socket buffers take.
      while (!full && written < 256 << 20) {
        full = !writeChunk(response, chunk)
        written += size
        await turn()
      }
      stop()
      response.end()
    })
    const socket = connect(port, '127.0.0.1').pause()
    t.teardown(() => socket.destroy())
    socket.write('POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n')
    await stopped
    t.ok(full, `chunks of ${size} bytes`)
    let text = ''
    for await (const bytes of socket.setEncoding('latin1')) text += bytes as string
    t.equal(unchunk(text.slice(text.indexOf('\r\n\r\n') + 4)).length, written, 'what did not fit comes, too')
  }
})

t.test('bytes stay in order where the response is corked, or writes itself in between', async t => {
  const port = await serve(t, response => {
    response.write('a')
    response.cork()
    response.write(Buffer.from('b'))
    setImmediate(() => { response.uncork() })
  })
  t.ok((await post(port)).equals(Buffer.concat([Buffer.from('ab'), ALL])))

  const between = await serve(t, () => {}, async response => {
    for (const [i, chunk] of CHUNKS.entries()) {
      if (i % 3 === 0) response.write(chunk)
      else writeChunk(response, chunk)
      if (i % 7 === 0) {
        response.cork()
        setImmediate(() => { response.uncork() })
      } else if (i % 4 === 3) await turn()
    }
    response.end()
  })
  t.ok((await post(between)).equals(ALL))
})

t.test('a head that the application has written goes first, out or not', async t => {
  const heads: Array<(response: ServerResponse) => void> = [
    response => { response.writeHead(200, { 'x-own': 'yes' }) },
    response => { response.writeHead(200, { 'x-own': 'yes' }).flushHeaders() },
    response => { response.setHeader('x-own', 'yes').flushHeaders() }
  ]
  for (const head of heads) {
    const text = await exchange(await serve(t, head), 'POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n')
    t.match(text.slice(0, 200), /^HTTP\/1\.1 200 OK\r\nx-own: yes\r\n/)
    t.ok(unchunk(text.slice(text.indexOf('\r\n\r\n') + 4)) === ALL.toString('latin1'))
  }
})

t.test('a response with a length, and one of HTTP/1.0, has no chunks', async t => {
  const sized = await exchange(await serve(t, response => { response.setHeader('content-length', ALL.length) }), 'POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n')
  t.ok(sized.slice(sized.indexOf('\r\n\r\n') + 4) === ALL.toString('latin1'))
  const old = await exchange(await serve(t, () => {}), 'POST / HTTP/1.0\r\ncontent-length: 0\r\n\r\n')
  t.ok(old.slice(old.indexOf('\r\n\r\n') + 4) === ALL.toString('latin1'))
})

t.test('a write of the application\'s own gets every chunk', async t => {
  const seen: Buffer[] = []
  const port = await serve(t, response => {
    const write = response.write.bind(response) as (chunk: Buffer) => boolean
    response.write = (chunk: Buffer) => {
      seen.push(chunk)
      return write(chunk)
    }
  })
  t.ok((await post(port)).equals(ALL))
  t.ok(Buffer.concat(seen).equals(ALL))
})

t.test('a write of the application\'s own gets every token of an event stream that is delivered', async t => {
  const tokens = Array.from({ length: 20 }, (_, i) => `data: ${i}\n\n`)
  const app = Fastify()
  t.teardown(() => app.close())
  let seen = ''
  app.post('/', async (_request, reply) => {
    const write = reply.raw.write.bind(reply.raw) as (chunk: Buffer) => boolean
    reply.raw.write = (chunk: Buffer) => {
      seen += String(chunk)
      return write(chunk)
    }
    const body = new Readable({ read () {} })
    body.push(tokens[0])
    await send(reply, body)
    for (const token of tokens.slice(1)) {
      await turn()
      body.push(token)
    }
    body.push(null)
    return reply
  })
  await app.listen({ port: 0, host: '127.0.0.1' })
  t.equal(String(await post((app.server.address() as AddressInfo).port)), tokens.join(''))
  t.equal(seen, tokens.join(''))
})

t.test('pipelined responses come whole, one after the other', async t => {
  // The first is the last to be written: the others wait without a connection.
  const responses: ServerResponse[] = []
  const port = await serve(t, response => { response.setHeader('x-number', responses.push(response)) }, async response => {
    if (response !== responses[0]) return
    while (responses.length < 3) await turn()
    for (const one of responses.toReversed()) await writeAll(one)
  })
  const request = 'POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n'
  const text = await exchange(port, `${request}\r\n${request}\r\n${request}connection: close\r\n\r\n`)
  const heads = Array.from(text.matchAll(/HTTP\/1\.1 200 OK\r\nx-number: (\d)\r\n[^]*?\r\n\r\n/g))
  t.strictSame(heads.map(([, number]) => number), ['1', '2', '3'])
  for (const [i, { 0: head, index }] of heads.entries()) t.ok(unchunk(text.slice(index + head.length, heads[i + 1]?.index)) === ALL.toString('latin1'))
})

t.test('HEAD has no body, and inject gets all of one', async t => {
  const bytes = Buffer.from(Array.from({ length: 200 }, (_, i) => `data: ${'é'.repeat(random.below(i % 10 === 0 ? 20_000 : 300))}\n\n`).join('') + DONE)
  const app = Fastify({ exposeHeadRoutes: false })
  t.teardown(() => app.close())
  app.route({
    method: ['GET', 'HEAD', 'POST'],
    url: '/',
    handler: async (request, reply) => {
      if (request.headers['x-chunked'] !== undefined) reply.header('transfer-encoding', 'chunked')
      // Each in a turn of its own.
      await send(reply, scripted(cut(bytes, Array.from({ length: 200 }, () => random.below(bytes.length))), EVENTS).body)
      return reply
    }
  })
  t.ok((await app.inject({ method: 'POST', url: '/' })).rawPayload.equals(bytes))
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const answer = await fetch(`http://127.0.0.1:${port}/`, { method: 'HEAD' })
  t.equal((await answer.arrayBuffer()).byteLength, 0)
  const next = await fetch(`http://127.0.0.1:${port}/`)
  t.equal(next.status, 200, 'the connection can be used again')
  t.ok(Buffer.from(await next.arrayBuffer()).equals(bytes))
  for (const own of ['', 'x-chunked: yes\r\n']) {
    const text = await exchange(port, `HEAD / HTTP/1.1\r\nhost: x\r\n${own}connection: close\r\n\r\n`)
    t.match(text.slice(0, 20), /^HTTP\/1\.1 200 OK/)
    t.equal(text.indexOf('\r\n\r\n'), text.length - 4, `nothing comes after the head ${own}`)
  }
})
