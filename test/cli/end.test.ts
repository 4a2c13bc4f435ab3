/** How `fastify-epd serve` ends. */
import { once } from 'node:events'
import { connect } from 'node:net'
import { join } from 'node:path'
import t from 'tap'
import { startCli } from '../helper/cli.ts'

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
