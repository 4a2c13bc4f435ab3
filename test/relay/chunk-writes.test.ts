import { once } from 'node:events'
import { createServer, type ServerResponse } from 'node:http'
import { connect, type AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import Fastify from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import { deliver } from '../../plugin/http/client.ts'
import { writeChunksWhole } from '../../plugin/http/chunk-writes.ts'
import { Random } from '../body/random-json.ts'

const random = new Random(7)
const CHUNKS = Array.from({ length: 200 }, () => Buffer.from('x'.repeat(1 + random.below(random.below(10) === 0 ? 40_000 : 300))))
const ALL = Buffer.concat(CHUNKS)

async function serve (t: Test, prepare: (response: ServerResponse) => void): Promise<number> {
  const server = createServer((_request, response) => {
    prepare(response)
    writeChunksWhole(response)
    pipeline(Readable.from(CHUNKS), response).catch(() => {})
  })
  t.teardown(() => { server.closeAllConnections(); server.close() })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return (server.address() as AddressInfo).port
}

async function post (port: number): Promise<Buffer> {
  return Buffer.from(await (await fetch(`http://127.0.0.1:${port}/`, { method: 'POST' })).arrayBuffer())
}

t.test('every byte comes, in order, whatever its chunk', async t => {
  const port = await serve(t, () => {})
  for (const bytes of await Promise.all([post(port), post(port), post(port)])) t.ok(bytes.equals(ALL))
})

t.test('a token of an event stream that is delivered is one write', async t => {
  let writes = 0
  const app = Fastify()
  t.teardown(() => app.close())
  app.post('/', (_request, reply) => {
    const body = new Readable({ read () {} })
    deliver({ statusCode: 200, headers: { 'content-type': 'text/event-stream' }, body, delivered: new Promise(() => {}) }, reply, {})
    body.push('data: 1\n\n')
    // The head is out then.
    setImmediate(() => {
      const { socket } = reply.raw.req
      const { write } = socket
      socket.write = ((...args: Parameters<typeof write>) => { writes++; return write.apply(socket, args) }) as typeof write
      reply.raw.once('finish', () => { socket.write = write })
      body.once('data', () => { setImmediate(() => { t.equal(writes, 1); body.push(null) }) })
      body.push('data: é\n\n')
    })
  })
  await app.listen({ port: 0, host: '127.0.0.1' })
  t.equal(String(await post((app.server.address() as AddressInfo).port)), 'data: 1\n\ndata: é\n\n')
})

t.test('bytes stay in order where the response is corked, or writes itself in between', async t => {
  const port = await serve(t, response => {
    response.write('a')
    response.cork()
    response.write(Buffer.from('b'))
    setImmediate(() => { response.uncork() })
  })
  t.equal(String(await post(port)).slice(0, 2), 'ab')
  t.equal((await post(port)).length, ALL.length + 2)
})

t.test('a write of the application\'s own gets every chunk', async t => {
  let seen = 0
  const port = await serve(t, response => {
    const write = response.write.bind(response) as (chunk: Buffer) => boolean
    response.write = (chunk: Buffer) => {
      seen += chunk.length
      return write(chunk)
    }
  })
  t.equal((await post(port)).length, ALL.length)
  t.equal(seen, ALL.length)
})

t.test('pipelined responses come whole, one after the other', async t => {
  const socket = connect(await serve(t, () => {}), '127.0.0.1')
  t.teardown(() => socket.destroy())
  socket.write('POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\nPOST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n')
  let text = ''
  for await (const bytes of socket.setEncoding('latin1')) text += bytes as string
  t.equal(text.match(/x{1,}/g)!.join('').length, 2 * ALL.length)
  t.equal(text.match(/HTTP\/1\.1 200/g)!.length, 2)
})

t.test('HEAD has no body, and inject gets all of one', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  app.route({ method: ['GET', 'POST'], url: '/', handler: (_request, reply) => { writeChunksWhole(reply.raw); return reply.type('text/event-stream').send(Readable.from(CHUNKS)) } })
  t.ok((await app.inject({ method: 'POST', url: '/' })).rawPayload.equals(ALL))
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const answer = await fetch(`http://127.0.0.1:${port}/`, { method: 'HEAD' })
  t.equal((await answer.arrayBuffer()).byteLength, 0)
  t.equal((await fetch(`http://127.0.0.1:${port}/`)).status, 200, 'the connection can be used again')
})
