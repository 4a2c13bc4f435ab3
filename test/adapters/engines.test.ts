import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createServer, request } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import t from 'tap'
import { pytorch } from '../../adapters/index.ts'
import type { EncoderResult, LeaseRef } from '../../adapters/adapter.ts'
import { packageRoot } from '../helper/package-root.ts'
import { Registry } from '../../plugin/registry/index.ts'
import { bodyFrom, bytesOf, callWith, dispatcherFor, nodeAt, silent } from '../helper/adapter-call.ts'
import { startEngineFor } from '../helper/engine.ts'
import { metric } from '../helper/metrics.ts'
import { until } from '../helper/until.ts'

/** The registry and the pytorch adapter against our real engines: an encoder, and a hybrid without vision weights. */

async function openLeases (url: string): Promise<number | undefined> {
  return metric(await (await fetch(`${url}/metrics`)).text(), 'epd_leases_open')
}

const PICTURE = 'data:image/png;base64,' + readFileSync(join(packageRoot(), 'docs', 'examples', 'shapes.png')).toString('base64')
const answerOf = (bytes: Buffer): string => (JSON.parse(bytes.toString()) as { choices: [{ message: { content: string } }] }).choices[0].message.content

t.test('real engines: probe, link, encode, generate, release, and an encoder that comes back as another process', async t => {
  const dispatcher = dispatcherFor(t)
  const call = callWith(dispatcher)
  const registry = new Registry({ dispatcher, log: silent, probeInterval: 100, probeBackoff: 50 })
  t.teardown(async () => { await registry.close() })
  const pd = await startEngineFor(t, { role: 'hybrid' })
  let e = await startEngineFor(t, { role: 'encoder' })
  registry.add({ url: e.url })
  registry.add({ url: pd.url })
  await registry.waitFor(snapshot => snapshot.link(e.url, pd.url) === 'linked')
  const [encoder, hybrid] = [registry.get(e.url)!, registry.get(pd.url)!]
  t.match(encoder, { role: 'encoder', adapter: { name: 'pytorch' }, info: { vision: 'full' } })
  t.match(hybrid, { role: 'hybrid', info: { vision: 'features' } })
  t.equal(encoder.info!.fingerprint, hybrid.info!.fingerprint)

  const { models: [model] } = hybrid
  const body = await bodyFrom({
    model, max_tokens: 8, temperature: 0, messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: PICTURE } }, { type: 'text', text: 'How many shapes are there?' }] }]
  })
  const path = '/v1/chat/completions'
  const encode = async (): Promise<EncoderResult[]> => await pytorch.encode({ node: encoder, consumer: hybrid, items: body.media, body }, call)
  const generate = async (features: EncoderResult[]): Promise<string> => answerOf(await bytesOf(await pytorch.generate({ node: hybrid, path, body, features }, call)))

  // The hybrid keeps features by content hash too, and would not pull what it has.
  const forget = async (): Promise<void> => { await fetch(`${pd.url}/distserve/clear_cache`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{}' }) }

  const first = await encode()
  t.match(first, [{ item: 0, node: e.url, cached: false, tokens: Number }])
  const answer = await generate(first)
  t.ok(answer.length > 0, `the answer is ${answer}`)
  await until(async () => await openLeases(e.url) === 0, 'the ACK has ended the lease')
  const second = await encode()
  t.equal(second[0]!.cached, true)
  t.equal(await generate(second), answer)

  const unused = await encode()
  t.equal(await openLeases(e.url), 1)
  const leases: LeaseRef[] = unused.map(({ lease, wire }) => ({ node: encoder, lease, wire }))
  await pytorch.release(leases, call)
  await pytorch.release(leases, call)
  t.equal(await openLeases(e.url), 0)
  await forget()
  await t.rejects(generate(unused), { code: 'FEATURES_GONE', unlinked: true }, 'a released lease is gone')

  const broken = await bodyFrom({ model, messages: [{ role: 'user', content: ['x', { type: 'image_url', image_url: { url: 'data:image/png;base64,AAAA' } }].map(part => typeof part === 'string' ? { type: 'text', text: part } : part) }] })
  await t.rejects(pytorch.encode({ node: encoder, consumer: hybrid, items: broken.media, body: broken }, call), { code: 'REJECTED', response: { statusCode: 400, body: /messages\[0\]\.content\[1\]/ } })

  const stale = await encode()
  const { port } = new URL(e.url)
  await e.close()
  await registry.waitFor(snapshot => snapshot.byId.get(e.url)!.state !== 'healthy')
  e = await startEngineFor(t, { role: 'encoder', port: Number(port) })
  await registry.waitFor(snapshot => snapshot.link(e.url, pd.url) === 'linked' && snapshot.byId.get(e.url)!.info!.epoch === e.engine.epoch)
  await forget()
  await t.rejects(generate(stale), { code: 'FEATURES_GONE' }, 'features of the process before')
  t.equal(await generate(await encode()), answer, 'and the new process serves')

  registry.remove(e.url)
  await until(async () => {
    await forget()
    return await generate(await encode()).then(() => false, (error: unknown) => (error as { code: string }).code === 'FEATURES_GONE')
  }, 'the hybrid has dropped the link')
  registry.add({ url: e.url })
  await registry.waitFor(snapshot => snapshot.link(e.url, pd.url) === 'linked')
  t.equal(await generate(await encode()), answer)
})

t.test('real engines: an encode call whose answer is lost on a connection that breaks is sent again, and leaves one lease', async t => {
  const call = callWith(dispatcherFor(t), { headers: { 'x-request-id': 'lost.e1' } })
  const e = await startEngineFor(t, { role: 'encoder' })
  let lost = 0
  const front = createServer((incoming, outgoing) => {
    const upstream = request(e.url + incoming.url!, { method: incoming.method, headers: incoming.headers, agent: false }, async response => {
      const answer = Buffer.concat(await response.toArray() as Buffer[])
      if (incoming.url === '/v1/chat/completions' && lost++ === 0) incoming.socket.resetAndDestroy()
      else outgoing.writeHead(response.statusCode!, response.headers).end(answer)
    })
    incoming.pipe(upstream)
  }).listen(0, '127.0.0.1')
  await once(front, 'listening')
  t.teardown(() => { front.closeAllConnections(); front.close() })
  const url = `http://127.0.0.1:${(front.address() as AddressInfo).port}`
  const node = nodeAt(url, { role: 'encoder' })
  const body = await bodyFrom({ model: 'tiny-internvl', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: PICTURE } }] }] })
  const probed = { ...node, info: await pytorch.probe(node, call) }
  const [result] = await pytorch.encode({ node: probed, consumer: nodeAt('http://pd'), items: body.media, body }, call)
  t.equal(lost, 2, 'the first answer was lost')
  t.equal(await openLeases(e.url), 1, 'its lease has ended')
  await pytorch.release([{ node: probed, lease: result!.lease, wire: result!.wire }], call)
  t.equal(await openLeases(e.url), 0)
})
