import t from 'tap'
import { pytorch } from '../../adapters/index.ts'
import type { Handoff, LeaseRef } from '../../adapters/adapter.ts'
import { Registry } from '../../plugin/registry/index.ts'
import { bodyFrom, callWith, dispatcherFor, silent, textOf } from '../helper/adapter-call.ts'
import { startEngineFor } from '../helper/engine.ts'
import { metric } from '../helper/metrics.ts'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'

/** The registry and the pytorch adapter against a real prefill and a real decode engine. */

const PATH = '/v1/chat/completions'

async function openLeases (url: string): Promise<number | undefined> {
  return metric(await (await fetch(`${url}/metrics`)).text(), 'epd_leases_open')
}

t.test('real engines: P hands over to D; unused leases are freed; a P that comes back is another process', async t => {
  const dispatcher = dispatcherFor(t)
  const call = callWith(dispatcher)
  const registry = new Registry({ dispatcher, log: silent, probeInterval: 100, probeBackoff: 50 })
  t.teardown(async () => { await registry.close() })
  const d = await startEngineFor(t, { role: 'decode' })
  let p = await startEngineFor(t, { role: 'prefill' })
  registry.add({ url: p.url })
  registry.add({ url: d.url })
  await registry.waitFor(snapshot => snapshot.link(p.url, d.url) === 'linked')
  t.match(registry.get(p.url), { role: 'prefill', adapter: { name: 'pytorch' }, info: { produces: ['kv:epd-zmq/1'], vision: 'full' }, notes: [] })
  t.match(registry.get(d.url), { role: 'decode', info: { accepts: ['kv:epd-zmq/1'], standalone: true }, notes: [] })

  const [prefill, decode] = [registry.get(p.url)!, registry.get(d.url)!]
  const { models: [model] } = decode
  const content = [{ type: 'image_url', image_url: { url: await drawScene(40) } }, { type: 'text', text: 'Describe the picture.' }]
  const body = await bodyFrom({ model, temperature: 0, stream: true, max_tokens: 30, messages: [{ role: 'user', content }] })
  const handOff = async (): Promise<Handoff> => await pytorch.prefill({ node: registry.get(p.url)!, decode, path: PATH, body, features: [] }, call)
  const generate = async (handoff: Handoff): Promise<string> => await textOf(await pytorch.generate({ node: decode, path: PATH, body, features: [], handoff }, call))
  const said = (stream: string): string => [...stream.matchAll(/"content":"([^"]*)"/g)].map(found => found[1]).join('')

  const first = await handOff()
  t.ok(first.tokens! > 80)
  t.equal(await openLeases(p.url), 1)
  const answer = said(await generate(first))
  t.match(answer, /^\d \w+ \w+/)
  await until(async () => await openLeases(p.url) === 0, 'D has acknowledged')
  t.match(await generate(first).catch((error: unknown) => error), { code: 'KV_GONE', unlinked: true }, 'what D has acknowledged is not there twice')

  const unused = await handOff()
  t.equal(await openLeases(p.url), 1)
  const lease: LeaseRef = { node: prefill, lease: unused.lease, wire: unused.wire }
  await pytorch.release([lease], call)
  t.equal(await openLeases(p.url), 0)
  const other = await handOff()
  await pytorch.release([lease], call)
  t.equal(await openLeases(p.url), 1, 'a repeated release ends no other lease')
  t.equal(said(await generate(other)), answer)

  const several = await bodyFrom({ model, n: 2, messages: [{ role: 'user', content: 'hi' }] })
  t.match(await pytorch.prefill({ node: prefill, decode, body: several, features: [] }, call).catch((error: unknown) => error), { code: 'REJECTED', response: { statusCode: 400, body: /"n"/ } })

  const stale = await handOff()
  const { port } = new URL(p.url)
  await p.close()
  t.match(await generate(stale).catch((error: unknown) => error), { code: 'KV_GONE' }, 'P is gone')
  await registry.waitFor(snapshot => snapshot.byId.get(p.url)!.state !== 'healthy')
  p = await startEngineFor(t, { role: 'prefill', port: Number(port) })
  await registry.waitFor(snapshot => snapshot.link(p.url, d.url) === 'linked' && snapshot.byId.get(p.url)!.info!.epoch === p.engine.epoch)
  t.match(await generate(stale).catch((error: unknown) => error), { code: 'KV_GONE' }, 'blocks of the process before')
  t.equal(said(await generate(await handOff())), answer, 'and the new process serves')
})
