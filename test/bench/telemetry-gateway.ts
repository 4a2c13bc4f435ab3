/** A gateway as the command line makes it, before one upstream: `telemetry-gateway.js UPSTREAM_PORT`. */
import Fastify from 'fastify'
import type { AddressInfo } from 'node:net'
import type { Adapter } from '../../adapters/adapter.ts'
import { postStream } from '../../adapters/http.ts'
import epd from '../../plugin/index.ts'
import { serve } from './processes.ts'

const url = `http://127.0.0.1:${process.argv[2]}`
const nothing = async (): Promise<void> => {}
const adapter: Adapter = {
  specificationVersion: 'v1',
  name: 'bench',
  probe: async () => ({ status: 'healthy', models: ['m'], role: 'hybrid', backend: 'bench', produces: [], accepts: [], vision: 'full' }),
  link: async (a, b) => ({ from: a.id, to: b.id, transport: 'none', epochs: [undefined, undefined] }),
  encode: async () => [],
  prefill: async () => { throw new Error('not here') },
  generate: async ({ node, body }, call) => await postStream(node, { path: '/json', body: body.splice({}) }, call),
  release: nothing,
  abort: nothing
}

const app = Fastify()
await app.register(epd, { embedded: false, ui: true, adapters: [adapter], nodes: [{ url, adapter: 'bench', role: 'hybrid' }] })
await app.listen({ port: 0, host: '127.0.0.1' })
await app.epd.nodes.waitFor(({ nodes }) => nodes[0]?.state === 'healthy')

let since = process.cpuUsage()
serve({
  port: () => (app.server.address() as AddressInfo).port,
  /** CPU time since the last call, in microseconds, user and system. */
  cpu: () => {
    const used = process.cpuUsage(since)
    since = process.cpuUsage()
    return used.user + used.system
  }
})
