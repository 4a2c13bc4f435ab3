import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import t, { type Test } from 'tap'
import { startApiServer, type ApiServer, type ApiServerOptions } from '../../engines/server/index.ts'
import { FakeEngine } from '../helper/fake-engine.ts'
import { until } from '../helper/until.ts'

/** An engine that streams for ever, and a client that has sent its request and reads nothing. */
async function unread (t: Test, options: Partial<ApiServerOptions> = {}): Promise<{ server: ApiServer, engine: FakeEngine, socket: Socket, state: { ended: number } }> {
  const server = await startApiServer({ version: '0.0.0', createEngine: async url => new FakeEngine(url), ...options })
  t.teardown(() => server.close())
  const engine = server.engine as FakeEngine
  const state = { ended: 0 }
  const event = Buffer.alloc(64 << 10, 'x')
  engine.answer = async call => ({
    status: 200,
    stream: (async function * () {
      try {
        while (!call.signal.aborted) yield event
        throw call.signal.reason
      } finally { state.ended++ }
    })()
  })
  const socket = connect(Number(new URL(server.url).port), '127.0.0.1').pause()
  socket.on('error', () => {})
  t.teardown(() => { socket.destroy() })
  const body = JSON.stringify({ messages: [{ role: 'user', content: 'hello' }], stream: true })
  socket.write(`POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`)
  await until(() => engine.calls.length === 1, 'the request has come')
  return { server, engine, socket, state }
}

t.test('a stream whose client reads nothing is ended after a while, and its connection closed', async t => {
  const { engine, socket, state } = await unread(t, { unreadTimeoutMs: 50 })
  await until(() => engine.calls[0]!.signal.aborted, 'the request is aborted')
  t.match(engine.calls[0]!.signal.reason, { code: 'cancelled', message: /has read nothing/ })
  await until(() => state.ended === 1, 'the engine\'s stream has ended')
  socket.resume()
  await once(socket, 'close')
})

t.test('the grace time ends connections, whether their clients read or not, or never finish a request', async t => {
  const { server, state } = await unread(t)
  const half = connect(Number(new URL(server.url).port), '127.0.0.1')
  half.on('error', () => {})
  half.write('POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{')
  await once(half, 'connect')
  const closed = once(half, 'close')
  await server.close(0)
  await until(() => state.ended === 1, 'the engine\'s stream has ended')
  await closed
})
