import { once } from 'node:events'
import { createServer } from 'node:net'

/** Below most systems' range of ephemeral ports, so that no other server or connection gets one of these meanwhile. */
const FIRST = 15_000
/** Tests that run beside each other have pids near each other: each process has ports of its own. */
const PROCESSES = 500
const PORTS_EACH = 30

let next = 0

/** A port for a server that has to know it beforehand; other servers listen on port 0. */
export async function freePort (): Promise<number> {
  for (;;) {
    const port = FIRST + process.pid % PROCESSES * PORTS_EACH + next++ % PORTS_EACH
    const server = createServer().listen(port, '127.0.0.1')
    const free = await once(server, 'listening').then(() => true, () => false)
    if (!free) continue
    server.close()
    await once(server, 'close')
    return port
  }
}
