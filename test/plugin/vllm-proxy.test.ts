/** In place of vLLM's disagg_epd_proxy.py: its flags and its /instances. */
import t from 'tap'
import { withVllmFlags } from '../../plugin/cli/vllm-flags.ts'
import { FakeVllm, SharedFolder } from '../helper/fake-vllm.ts'
import { buildGateway, post } from '../helper/fake-gateway.ts'
import { runCli, startCli } from '../helper/cli.ts'
import { until } from '../helper/until.ts'
import { chat, dataUrl, imagePart, picture, textPart } from '../vllm/pictures.ts'

t.test('the flags become nodes', async t => {
  const [e, p, d] = ['http://e1:1, http://e2:2/', 'http://p:3', 'http://d:4']
  t.same(withVllmFlags({}, { 'encode-servers-urls': e, 'prefill-servers-urls': 'Disable', 'decode-servers-urls': d }, {}).options, {
    nodes: [{ url: 'http://e1:1', role: 'encoder', adapter: 'vllm' }, { url: 'http://e2:2', role: 'encoder', adapter: 'vllm' }, { url: d, role: 'hybrid', adapter: 'vllm' }]
  })
  t.match(withVllmFlags({ nodes: [{ url: 'http://x:1' }] }, { 'encode-servers-urls': e, 'prefill-servers-urls': p, 'decode-servers-urls': d }, {}).options.nodes,
    [{ url: 'http://x:1' }, {}, {}, { url: p, role: 'prefill' }, { url: d, role: 'decode' }], 'beside those of the configuration')
  t.same(withVllmFlags({ retries: 1 }, { 'decode-retries': '3', 'probe-timeout': '0.5' }, {}).options, { retries: 3, timeouts: { probe: 500 } })
  t.same(withVllmFlags({}, { 'decode-retries': '0' }, {}).options, { retries: 0 })
  t.same(withVllmFlags({ ui: true }, {}, {}), { options: { ui: true }, notes: [] })
  t.match(withVllmFlags({}, { 'probe-interval': '5', 'evicted-ttl': '900' }, {}).notes, [/^--probe-interval changes nothing/, /^--evicted-ttl/])
  t.same(withVllmFlags({ vllm: { embeds: 'allow' } }, { 'no-rewrite': true }, {}).options, { vllm: { embeds: 'allow', handoff: 'raw' } })
  t.match(withVllmFlags({}, { 'dynamic-registration': true }, { ADMIN_API_KEY: 'k' }).options, { embedded: false, adminKey: 'k' })
})

t.test('mistakes in the flags name the flag', async t => {
  const mistakes: Array<[Parameters<typeof withVllmFlags>[1], RegExp]> = [
    [{ 'encode-servers-urls': 'http://e:1' }, /both --encode-servers-urls and --decode-servers-urls/],
    [{ 'encode-servers-urls': 'e:1', 'decode-servers-urls': 'http://d:1' }, /--encode-servers-urls must be an http/],
    [{ 'decode-retries': 'often' }, /--decode-retries must be a number/],
    [{ 'dynamic-registration': true }, /ADMIN_API_KEY/],
    [{ 'encode-servers-urls': 'http://e:1', 'decode-servers-urls': 'http://d:1', 'ec-consumer-zmq-addrs': 'tcp://d:1', 'ec-consumer-dp-size': '2' }, /--ec-consumer-zmq-addrs must hold 2 addresses, one for each replica of each decode server, not 1/],
    [{ 'encode-servers-urls': 'http://e:1', 'decode-servers-urls': 'http://d:1', 'ec-consumer-zmq-addrs': 'tcp://d:1', 'ec-consumer-dp-size': '0.5' }, /--ec-consumer-dp-size must be a whole number/],
    [{ 'encode-servers-urls': 'http://e:1', 'prefill-servers-urls': 'http://p:1', 'decode-servers-urls': 'http://d:1', 'ec-consumer-zmq-addrs': 'tcp://d:1' }, /without --prefill-servers-urls/]
  ]
  for (const [flags, message] of mistakes) t.throws(() => withVllmFlags({}, flags, {}), message)
  t.throws(() => withVllmFlags({}, { 'dynamic-registration': true, 'encode-servers-urls': 'http://e:1', 'decode-servers-urls': 'http://d:1' }, { ADMIN_API_KEY: 'k' }), { message: /leave the/ })
  t.match(await runCli(['serve', '--decode-servers-urls', 'http://d:1']), { code: 2, stderr: /both --encode-servers-urls/ })
})

t.test('the command line of the proxy starts a gateway', async t => {
  const folder = new SharedFolder()
  const e = await FakeVllm.start(t, { server: 'e', folder })
  const pd = await FakeVllm.start(t, { server: 'pd', folder })
  const gateway = await startCli(t, ['serve', '--port', '0', '--no-rewrite', '--fail-threshold', '3', '--encode-servers-urls', e.url, '--prefill-servers-urls', 'disable', '--decode-servers-urls', `${pd.url}/`])
  const nodes = async (): Promise<Record<string, { adapter: string, role: number, health: string }>> => await (await fetch(`${gateway.url}/nodes/status`)).json() as never
  await until(async () => Object.values(await nodes()).every(node => node.health === 'healthy'), 'both are healthy')
  t.match(await nodes(), { [e.url]: { adapter: 'vllm', role: 4 }, [pd.url]: { adapter: 'vllm', role: 1 } })
  t.match(gateway.stderr(), /--fail-threshold changes nothing/)
  const answer = await post(`${gateway.url}/v1/chat/completions`, chat([imagePart(dataUrl(picture(1, 56))), textPart('what is it')], { max_tokens: 2 }))
  t.match(await answer.json(), { model: 'tiny', usage: { completion_tokens: 2 } })
})

t.test('/instances: register, list, remove', async t => {
  const folder = new SharedFolder()
  const e = await FakeVllm.start(t, { server: 'e', folder })
  const pd = await FakeVllm.start(t, { server: 'pd', folder })
  const { url, app } = await buildGateway(t, { nodes: [], options: { adminKey: 'secret', embedded: false } })
  const call = async (method: string, query: string, payload?: object, key: string | undefined = 'secret'): Promise<[number, unknown]> => {
    const body = payload === undefined ? {} : { body: JSON.stringify(payload) }
    const answer = await fetch(`${url}/instances${query}`, { method, headers: { 'x-api-key': key, ...(payload === undefined ? {} : { 'content-type': 'application/json' }) }, ...body })
    return [answer.status, await answer.json()]
  }
  const none = { live: [], evicted: [] }
  t.same(await call('GET', ''), [200, { encode: none, prefill: none, decode: none, prefill_decode: none }])
  t.same(await call('POST', '', { role: 'encode', url: `${e.url}/` }), [200, { registered: true }])
  t.same(await call('POST', '', { role: 'encode', url: e.url, dp_size: 1, ec_zmq_addrs: [] }), [200, { registered: false }], 'again')
  t.same(await call('POST', '', { role: 'prefill_decode', url: pd.url }), [200, { registered: true }])
  await app.epd.nodes.waitFor(snapshot => snapshot.nodes.every(node => node.state === 'healthy'))
  t.same(await call('GET', ''), [200, { encode: { live: [e.url], evicted: [] }, prefill: none, decode: none, prefill_decode: { live: [pd.url], evicted: [] } }])
  await e.kill()
  app.epd.nodes.probe(e.url)
  await app.epd.nodes.waitFor(snapshot => snapshot.byId.get(e.url)?.state === 'unhealthy')
  t.match((await call('GET', ''))[1], { encode: { live: [], evicted: [e.url] } })
  t.same(await call('DELETE', `?url=${encodeURIComponent(e.url + '/')}`), [200, { removed: true }])
  t.same(await call('DELETE', `?url=${encodeURIComponent(e.url)}`), [200, { removed: false }])

  t.match(await call('POST', '', { role: 'decode', url: pd.url }), [409, { detail: /changing its role/ }])
  t.match(await call('POST', '', { role: 'decode', url: 'http://d:1', ec_zmq_addrs: ['tcp://d:1'] }), [400, { detail: 'Only EC consumers accept Mooncake addresses' }])
  t.match(await call('POST', '', { role: 'prefill_decode', url: 'http://d:1', ec_zmq_addrs: ['tcp://d:1'], dp_size: 2 }), [422, { detail: /one address per DP replica/ }])
  t.match(await call('POST', '', { role: 'prefill_decode', url: 'http://d:1', ec_zmq_addrs: ['http://d:1'] }), [422, { detail: /ec_zmq_addrs/ }])
  t.match(await call('POST', '', { role: 'both', url: 'http://d:1' }), [422, { detail: /role/ }])
  t.match(await call('POST', '', { role: 'decode', url: 'ftp://d' }), [422, { detail: /url/ }])
  t.match(await call('DELETE', ''), [422, { detail: /url/ }])
  t.match(await call('POST', '', { role: 'decode', url: 'http://d:1' }, 'wrong'), [403, { detail: 'Invalid admin API key' }])
  t.same(app.epd.nodes.snapshot().nodes.map(node => node.id), [pd.url], 'nothing refused was added')
})

t.test('/instances without a key answers operators only', async t => {
  const { app } = await buildGateway(t, { nodes: [], options: { embedded: false } })
  const from = async (remoteAddress: string, headers = {}): Promise<number> => (await app.inject({ method: 'GET', url: '/instances', remoteAddress, headers })).statusCode
  t.equal(await from('127.0.0.1'), 200)
  t.equal(await from('10.0.0.1'), 403)
  t.equal(await from('10.0.0.1', { 'x-api-key': 'guess' }), 403, 'without adminKey no key opens')
})
