import { createHash } from 'node:crypto'
import type { Server } from 'node:http'
import Fastify, { type FastifyHttpOptions, type FastifyInstance } from 'fastify'
import type { Test } from 'tap'
import epd, { type EpdOptions, type RegistryApi } from '../../plugin/index.ts'
import { fakeAdapter, type FakeNode } from './fake-node.ts'

export interface FakeGateway {
  readonly app: FastifyInstance
  readonly url: string
}

export interface BuildOptions {
  readonly nodes?: readonly FakeNode[]
  readonly options?: EpdOptions
  readonly fastify?: FastifyHttpOptions<Server>
  /** @default 0, a free one */
  readonly port?: number
  /** Runs before the plugin is registered, and after. */
  readonly before?: (app: FastifyInstance) => unknown
  readonly after?: (app: FastifyInstance) => unknown
}

/** A listening application with the plugin, its nodes healthy and linked. Idle nodes are asked in order, unless a policy is given. */
/** Neither random ports choose the node, nor does the load of the machine that runs the tests shed requests. */
const forTests = ({ routing, admission }: EpdOptions): EpdOptions =>
  ({ routing: { policy: 'least-tokens', ...routing }, admission: { encoderTime: 600_000, ...admission } })

export async function buildGateway (t: Pick<Test, 'teardown'>, { nodes = [], options = {}, fastify = {}, port = 0, before, after }: BuildOptions = {}): Promise<FakeGateway> {
  const app = Fastify({ forceCloseConnections: true, pluginTimeout: 0, ...fastify })
  t.teardown(() => app.close())
  await before?.(app)
  await app.register(epd, { embedded: false, adapters: [fakeAdapter], nodes: nodes.map(node => node.spec), ...options, ...forTests(options) })
  await after?.(app)
  const url = await app.listen({ host: '127.0.0.1', port })
  await settled(app.epd.nodes, nodes)
  return { app, url }
}

export async function settled (registry: RegistryApi, nodes: readonly FakeNode[]): Promise<void> {
  await registry.waitFor(snapshot => nodes.every(({ url, role }) => {
    const node = snapshot.byId.get(url)
    if (node?.state !== 'healthy') return false
    return role === 'hybrid' || role === 'decode' || [...node.links.values()].every(link => link.state !== 'linking' && link.state !== 'none')
  }), { signal: AbortSignal.timeout(10_000) })
}

/** A data URL that is never decoded, of so many base64 characters; another seed gives another picture. */
export function pictureUrl (seed: number | string, length = 4_000): string {
  let text = ''
  for (let i = 0; text.length < length; i++) text += createHash('sha256').update(`${seed} ${i}`).digest('hex')
  return `data:image/png;base64,${text.slice(0, length)}`
}

export function chat (text: string, ...urls: string[]): { model: string, messages: object[] } {
  const parts = [...urls.map(url => ({ type: 'image_url', image_url: { url } })), { type: 'text', text }]
  return { model: 'vlm', messages: [{ role: 'user', content: parts }] }
}

export async function post (url: string, body: unknown, init: RequestInit = {}): Promise<Response> {
  return await fetch(url, { method: 'POST', body: JSON.stringify(body), ...init, headers: { 'content-type': 'application/json', ...init.headers } })
}
