import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { createServer } from 'node:net'

/** Below every system's range of ephemeral ports, so that no other server or connection gets one of these meanwhile. */
const PORTS = { first: 15_000, count: 15_000 }

/** A port for a server that has to know it beforehand; other servers listen on port 0. */
export async function freePort (): Promise<number> {
  for (;;) {
    const port = PORTS.first + randomInt(PORTS.count)
    const server = createServer().listen(port, '127.0.0.1')
    const free = await once(server, 'listening').then(() => true, () => false)
    if (!free) continue
    server.close()
    await once(server, 'close')
    return port
  }
}
