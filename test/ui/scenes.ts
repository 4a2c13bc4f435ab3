import type { Test } from 'tap'
import { TraceStore, type EpdOptions } from '../../plugin/index.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { startCli } from '../helper/cli.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { tempFile } from '../helper/temp.ts'
import { until } from '../helper/until.ts'
import { startLoad } from './load.ts'

const PATH = '/v1/chat/completions'

type Scope = Pick<Test, 'teardown'>

/** What a page shows, at the address of a gateway. */
export interface Scene { readonly url: string, readonly hash?: string }
export interface FakeScene extends Scene { readonly nodes: readonly FakeNode[], readonly store: TraceStore }

/** Embedded engines under a load. */
export async function normalScene (t: Scope, requests = 8): Promise<Scene> {
  const config = await tempFile(t, 'epd.config.json', JSON.stringify({ embedded: { encoders: 2, engines: 1 }, telemetry: { captureContent: true } }))
  const gateway = await startCli(t, ['serve', '--port', '0', '--log-level', 'warn', '--config', config])
  const load = await startLoad(gateway.url)
  t.teardown(() => load.stop())
  await until(() => load.sent > requests, 'some requests are through', 60_000)
  return gateway
}

/** A gateway whose requests went well, went well in the end, failed at every node, and were refused by one. */
export async function failingScene (t: Scope): Promise<FakeScene> {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t), FakeNode.start(t)])
  const [e1, , pd1, pd2] = nodes as [FakeNode, FakeNode, FakeNode, FakeNode]
  const store = new TraceStore()
  const { url } = await buildGateway(t, { nodes, options: { ui: true, bypass: 'never', telemetry: { store } } })
  const ask = async (...urls: string[]): Promise<number> => {
    const answer = await post(url + PATH, chat('How many?', ...urls))
    await answer.arrayBuffer()
    return answer.status
  }
  for (let n = 0; n < 4; n++) await ask(pictureUrl(n))
  for (const node of [pd1, pd2]) node.generateFaults.push('rejected')
  await ask()
  for (const node of [pd1, pd2]) node.generateFaults.length = 0
  // Which encoder is asked first goes by their ports: until it is the one that fails.
  e1.encodeFaults.push('failed')
  for (let n = 0; e1.encodeFaults.length > 0; n++) await ask(pictureUrl(`moved ${n}`))
  for (const node of [pd1, pd2]) node.generateFaults.push('failed')
  await ask(pictureUrl('lost'))
  return { url, nodes, store }
}

/** A node with an open breaker, errors, links, and something to say of itself; the page shows it. */
export async function nodeScene (t: Scope, options: EpdOptions = {}): Promise<FakeScene> {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t), FakeNode.start(t)])
  const [encoder, , sick] = nodes as [FakeNode, FakeNode, FakeNode]
  encoder.metrics = 'epd_sequences{status="waiting"} 2\nepd_feature_blocks_capacity 100\nepd_feature_blocks_free 35\n'
  sick.metrics = 'vllm:num_requests_waiting 3\nvllm:num_requests_running 8\nvllm:kv_cache_usage_perc 0.72\n'
  const store = new TraceStore()
  const { url, app } = await buildGateway(t, { nodes, options: { ui: true, bypass: 'never', telemetry: { store }, ...options } })
  sick.generateFaults.push('failed', 'busy', 'failed')
  while (sick.generateFaults.length > 0) await (await post(url + PATH, chat('How many?', pictureUrl(1)))).arrayBuffer()
  const { registry } = app.epd.gateway
  while (registry.get(sick.url)!.breakers.decode === 'closed') registry.acquire(sick.url, 'decode').end(new Error('scripted'), 'failed')
  return { url, nodes, store, hash: `#node=${encodeURIComponent(sick.url)}` }
}

/** Two of those requests beside each other: the first one, with nothing cached, and a later one about the same picture. */
export async function comparedScene (t: Scope): Promise<Scene> {
  const { url } = await normalScene(t)
  const { traces } = await (await fetch(`${url}/epd/traces?plan=e-pd`)).json() as { traces: Array<{ traceId: string, items: number }> }
  const single = traces.filter(({ items }) => items === 1)
  return { url, hash: `#trace=${single[0]!.traceId}&compare=${single.at(-1)!.traceId}` }
}

/** Forty nodes of all roles: one dead, one drained, one that rests, a pair that can not link. */
export async function manyScene (t: Scope): Promise<FakeScene> {
  const roles = [['encoder', 12], ['prefill', 8], ['decode', 12], ['hybrid', 8]] as const
  const nodes = await Promise.all(roles.flatMap(([role, count]) => Array.from({ length: count }, () => FakeNode.start(t, { role }))))
  for (const [i, node] of nodes.entries()) node.metrics = node.role === 'encoder' ? `epd_feature_blocks_capacity 100\nepd_feature_blocks_free ${100 - 7 * (i + 1)}\n` : `vllm:num_requests_waiting ${i % 4}\nvllm:kv_cache_usage_perc ${((i * 37) % 100) / 100}\n`
  const store = new TraceStore()
  const { url, app } = await buildGateway(t, { nodes, options: { ui: true, bypass: 'never', telemetry: { store } } })
  const { registry } = app.epd.gateway
  const [dead, drained, resting, lonely] = [nodes[3]!, nodes[14]!, nodes[25]!, nodes[6]!]
  for (let n = 0; n < 12; n++) await (await post(url + PATH, chat('How many?', pictureUrl(n)))).arrayBuffer()
  for (let n = 0; n < 40; n++) registry.reserve(nodes[n]!.url, (n * 997) % 9_000)
  registry.refuseLinks(lonely.url, 'another fingerprint')
  registry.drain(drained.url, true)
  while (registry.get(resting.url)!.breakers.decode === 'closed') registry.acquire(resting.url, 'decode').end(new Error('scripted'), 'failed')
  await dead.close()
  await registry.ask(dead.url)
  return { url, nodes, store }
}
