/** One gateway, one encoder, a PyTorch-like and (started as a user would) a TurboMind-like engine at the same time; a server like LMDeploy's TurboMind beside them. */
import Fastify from 'fastify'
import t from 'tap'
import epd from '../../plugin/index.ts'
import { startCli } from '../helper/cli.ts'
import { startEngineFor } from '../helper/engine.ts'
import { FakeLmdeploy } from '../helper/fake-lmdeploy.ts'
import { metric } from '../helper/metrics.ts'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'

async function gauge (url: string, name: string): Promise<number> {
  return metric(await (await fetch(`${url}/metrics`)).text(), name) ?? NaN
}

async function atRest (...urls: string[]): Promise<void> {
  for (const url of urls) {
    await until(async () => await gauge(url, 'epd_leases_open') === 0 && await gauge(url, 'epd_feature_blocks_free') + await gauge(url, 'epd_feature_blocks_cached') === await gauge(url, 'epd_feature_blocks_capacity') &&
      await gauge(url, 'epd_kv_blocks_free') + await gauge(url, 'epd_kv_blocks_cached') === await gauge(url, 'epd_kv_blocks_capacity'), `${url} is at rest`)
  }
}

t.test('E -> PyTorch-like and E -> TurboMind-like behind one gateway give the same answers', async t => {
  const app = Fastify({ forceCloseConnections: true })
  t.teardown(() => app.close())
  await app.register(epd, { embedded: false, bypass: 'never', routing: { policy: 'least-tokens' } })
  const gateway = await app.listen({ host: '127.0.0.1', port: 0 })
  const [encoder, pytorch, turbomind] = await Promise.all([
    startEngineFor(t, { role: 'encoder', proxyUrl: gateway }),
    startEngineFor(t, { role: 'hybrid', proxyUrl: gateway }),
    startCli(t, ['engine', '--role', 'hybrid', '--backend', 'turbomind', '--no-vision', '--session-len', '1024', '--max-prefill-token-num', '64', '--threads', '1', '--proxy-url', gateway, '--log-level', 'warn'])
  ])
  await app.epd.nodes.waitFor(snapshot => [pytorch, turbomind].every(({ url }) => snapshot.byId.has(encoder.url) && snapshot.byId.has(url) && snapshot.link(encoder.url, url) === 'linked'), { signal: AbortSignal.timeout(10_000) })
  t.equal(app.epd.nodes.get(turbomind.url)!.adapter.name, 'turbomind', 'found out by itself')
  t.match(app.epd.nodes.get(turbomind.url)!.info, { backend: /turbomind/, vision: 'features', accepts: ['features:epd-zmq/1'] })

  const pictures = await Promise.all([1, 2, 3].map(seed => drawScene(seed)))
  const ask = async (i: number): Promise<{ plan: string | null, answer: string }> => {
    const urls = pictures.slice(0, i % 4)
    const response = await fetch(`${gateway}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'tiny-internvl', temperature: 0, max_tokens: 40, messages: [{ role: 'user', content: [...urls.map(url => ({ type: 'image_url', image_url: { url } })), { type: 'text', text: 'Describe the picture.' }] }] })
    })
    const body = await response.json() as { choices?: [{ message: { content: string } }] }
    return { plan: response.headers.get('x-epd-plan'), answer: body.choices?.[0].message.content ?? JSON.stringify(body) }
  }
  const answers = await Promise.all(Array.from({ length: 16 }, (_, i) => ask(i)))
  for (let kind = 0; kind < 4; kind++) {
    const same = answers.filter((_, i) => i % 4 === kind)
    t.equal(new Set(same.map(({ answer }) => answer)).size, 1, same[0]!.answer)
    t.same(new Set(same.map(({ plan }) => plan)), new Set([kind === 0 ? 'pd' : 'e-pd']))
  }
  for (const { url } of [pytorch, turbomind]) t.ok(await gauge(url, 'epd_migrated_bytes_total') > 0, 'both have pulled features')
  await atRest(encoder.url, pytorch.url, turbomind.url)

  const real = await FakeLmdeploy.start({ backend: 'turbomind', model: 'other-vlm' })
  t.teardown(() => real.close())
  app.epd.nodes.add({ url: real.url, role: 'hybrid' })
  await app.epd.nodes.waitFor(snapshot => snapshot.byId.get(real.url)?.state === 'healthy', { signal: AbortSignal.timeout(10_000) })
  t.match(app.epd.nodes.get(real.url), { adapter: { name: 'turbomind' }, info: { backend: 'lmdeploy turbomind', accepts: [] } })
  const plain = await fetch(`${gateway}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ model: 'other-vlm', messages: [{ role: 'user', content: 'Hi' }] }) })
  t.equal(plain.status, 200)
  t.equal(plain.headers.get('x-epd-plan'), 'pd')
  await plain.arrayBuffer()
})
