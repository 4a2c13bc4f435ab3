/** How `fastify-epd serve` ends. */
import { once } from 'node:events'
import { connect, createServer, type AddressInfo } from 'node:net'
import { join } from 'node:path'
import t from 'tap'
import { runCli, startCli } from '../helper/cli.ts'

for (const [what, bytes] of [['no request', ''], ['half a request', 'POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n']] as const) {
  t.test(`a connection with ${what} does not hold the end up`, async t => {
    const dir = t.testdir({ 'epd.config.json': '{ "embedded": false }' })
    const gateway = await startCli(t, ['serve', '--config', join(dir, 'epd.config.json'), '--port', '0'])
    const { hostname, port } = new URL(gateway.url)
    const socket = connect(Number(port), hostname).on('error', () => {})
    t.teardown(() => socket.destroy())
    await once(socket, 'connect')
    socket.write(bytes)
    const ended = once(socket, 'close')
    socket.resume()
    // Connections are accepted in their order.
    t.equal((await fetch(`${gateway.url}/livez`)).status, 200)
    t.equal(await gateway.stop(), 0, 'within the minute that stop() waits')
    await ended
  })
}

for (const workers of ['1', '2']) {
  t.test(`a port that is taken ends ${workers === '1' ? 'it' : 'it, with workers too,'} with the flag that names another one`, async t => {
    const taken = createServer().listen(0, '127.0.0.1')
    t.teardown(() => { taken.close() })
    await once(taken, 'listening')
    const dir = t.testdir({ 'epd.config.json': '{ "embedded": false }' })
    const serve = await runCli(['serve', '--config', join(dir, 'epd.config.json'), '--port', String((taken.address() as AddressInfo).port), '--workers', workers])
    t.equal(serve.code, 1)
    t.match(serve.stderr, /EADDRINUSE.*: the port is taken; --port names another one/)
    t.notMatch(serve.stderr, 'takes its place')
  })
}
