/** Named keys, through the routes of the gateway. */
import { createHash } from 'node:crypto'
import t, { type Test } from 'tap'
import { Rates } from '../../plugin/http/keys/rates.ts'
import type { EpdOptions } from '../../plugin/index.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post, type FakeGateway } from '../helper/fake-gateway.ts'
import { COMPLETION, json, modelServer } from '../helper/model-server.ts'
import { startRedis } from '../helper/redis.ts'
import { until } from '../helper/until.ts'

const CHAT = '/v1/chat/completions'
type Key = NonNullable<EpdOptions['keys']>[number]

function key (name: string, bounds: Partial<Key> = {}): Key {
  return { name, hash: `sha256:${createHash('sha256').update(`secret-${name}`).digest('hex')}`, ...bounds }
}

const as = (name: string): RequestInit => ({ headers: { authorization: `Bearer secret-${name}` } })

/** A gateway in front of a server whose answers say that they cost 100 and 11 tokens. */
async function gateway (t: Test, keys: readonly Key[], options: EpdOptions = {}): Promise<FakeGateway> {
  const node = await modelServer(t, (_request, response) => { json(response, 200, { ...COMPLETION, usage: { prompt_tokens: 100, completion_tokens: 11 } }) })
  const found = await buildGateway(t, { options: { keys, nodes: [{ url: node.url, adapter: 'openai' }], ...options } })
  await found.app.epd.nodes.waitFor(({ models }) => models.includes('m'))
  return found
}

const TEXT = { model: 'm', messages: [{ role: 'user', content: 'Hello' }] }

t.test('a key is taken from Authorization or x-api-key, and others are refused', async t => {
  const { url } = await gateway(t, [key('a')], { apiKeys: ['plain'] })
  const status = async (headers: Record<string, string>): Promise<number> => (await post(url + CHAT, TEXT, { headers })).status
  t.equal(await status({ authorization: 'Bearer secret-a' }), 200)
  t.equal(await status({ 'x-api-key': 'secret-a' }), 200)
  t.equal(await status({ authorization: 'Bearer plain' }), 200, 'apiKeys count beside keys')
  t.equal(await status({ authorization: 'Bearer other' }), 401)
  t.equal(await status({ authorization: `Bearer ${key('a').hash}` }), 401, 'the hash is no key')
  t.equal(await status({}), 401)
})

t.test('a key is the bytes that a client sends, whichever they are', async t => {
  const bytes = [Buffer.from('kéyü-🐟'), Buffer.from('kéy', 'latin1'), Buffer.from('a,b="c"')]
  const keys = bytes.map((secret, i) => ({ name: ['__proto__', 'constructor', 'c'][i]!, hash: `sha256:${createHash('sha256').update(secret).digest('hex')}`, requests: 2 }))
  const plain = 'plän'
  const { url } = await gateway(t, keys, { apiKeys: [plain] })
  // Of fetch a header's value has a character for each byte.
  const status = async (secret: Buffer): Promise<number[]> => [
    (await post(url + CHAT, TEXT, { headers: { authorization: `Bearer ${secret.toString('latin1')}` } })).status,
    (await post(url + CHAT, TEXT, { headers: { 'x-api-key': secret.toString('latin1') } })).status
  ]
  for (const secret of bytes) t.same(await status(secret), [200, 200], String(secret))
  for (const secret of bytes) t.same(await status(secret), [429, 429], 'each is counted for itself')
  for (const encoding of ['utf8', 'latin1'] as const) t.same(await status(Buffer.from(plain, encoding)), [200, 200], `apiKeys: ${encoding}`)
  t.same(await status(Buffer.from('plan')), [401, 401])
})

t.test('a key may use its models only, and knows of no other', async t => {
  const node = await FakeNode.start(t, { models: ['x', 'y'] })
  const { url } = await buildGateway(t, { nodes: [node], options: { keys: [key('a', { models: ['x'] }), key('b')] } })
  const ids = async (name: string): Promise<string[]> => (await (await fetch(`${url}/v1/models`, as(name))).json() as { data: Array<{ id: string }> }).data.map(({ id }) => id)
  t.same([await ids('a'), await ids('b')], [['x'], ['x', 'y']])
  t.equal((await post(url + CHAT, { ...chat('?'), model: 'x' }, as('a'))).status, 200)
  const refused = await post(url + CHAT, { ...chat('?'), model: 'y' }, as('a'))
  t.equal(refused.status, 404)
  t.match(await refused.json(), { error: { code: 'model_not_found', param: 'model' } })
  t.equal((await fetch(`${url}/v1/models/y`, as('a'))).status, 404)
  t.equal((await post(url + CHAT, { ...chat('?'), model: 'y' }, as('b'))).status, 200)
  const form = new FormData()
  form.set('model', 'y')
  t.equal((await fetch(`${url}/v1/audio/transcriptions`, { method: 'POST', body: form, ...as('a') })).status, 404)
  const nameless = await post(`${url}/v1/moderations`, { input: 'x' }, as('a'))
  t.match(await nameless.json(), { error: { code: 'missing_value', param: 'model' } })
})

t.test('requests a minute are bounded, with headers that say how far', async t => {
  const { url } = await gateway(t, [key('a', { requests: 2 }), key('b')])
  const [one, two, three] = [await post(url + CHAT, TEXT, as('a')), await post(url + CHAT, TEXT, as('a')), await post(url + CHAT, TEXT, as('a'))]
  t.match([one.status, two.status, three.status], [200, 200, 429])
  t.same([one, two, three].map(({ headers }) => [headers.get('x-ratelimit-limit-requests'), headers.get('x-ratelimit-remaining-requests')]), [['2', '1'], ['2', '0'], ['2', '0']])
  t.match(one.headers.get('x-ratelimit-reset-requests'), /^\d+s$/)
  const wait = Number(three.headers.get('retry-after'))
  t.ok(wait > 50 && wait <= 60, String(wait))
  t.match(await three.json(), { error: { code: 'rate_limit_exceeded', message: /The key a may have no more than 2 requests a minute/ } })
  t.equal((await fetch(`${url}/v1/models`, as('a'))).status, 200, 'looking costs nothing')
  t.equal((await post(url + CHAT, TEXT, as('b'))).status, 200, 'another key has bounds of its own')
})

t.test('tokens a minute are what answers say they were', async t => {
  const { url } = await gateway(t, [key('a', { tokens: 200 })])
  const first = await post(url + CHAT, TEXT, as('a'))
  t.equal(first.status, 200)
  // The estimate of a prompt is small: the answer's 111 tokens count when it is over.
  const remaining = Number(first.headers.get('x-ratelimit-remaining-tokens'))
  t.ok(remaining > 150 && remaining < 200, String(remaining))
  const second = await until(async () => {
    const answer = await post(url + CHAT, TEXT, as('a'))
    return answer.status === 429 ? answer : Number(answer.headers.get('x-ratelimit-remaining-tokens')) < 100 ? answer : undefined
  }, 'the usage has been counted')
  t.equal(second.status === 429 ? 429 : (await post(url + CHAT, TEXT, as('a'))).status, 429)
})

t.test('vision tokens a minute are bounded; what is refused gives them back', async t => {
  const nodes = [await FakeNode.start(t, { role: 'encoder' }), await FakeNode.start(t)]
  const { url } = await buildGateway(t, { nodes, options: { keys: [key('a', { visionTokens: 20_000, tokens: 1_000_000 }), key('b', { visionTokens: 100_000, tokens: 10 })] } })
  const ask = async (name: string, n: number): Promise<Response> => await post(url + CHAT, chat('?', ...Array.from({ length: n }, (_, i) => pictureUrl(i))), as(name))
  const one = await ask('a', 1)
  t.equal(one.status, 200)
  const used = 20_000 - Number(one.headers.get('x-ratelimit-remaining-vision-tokens'))
  t.ok(used > 0 && used < 20_000, String(used))
  const many = await ask('a', Math.ceil(20_000 / used) + 1)
  t.equal(many.status, 429)
  t.match(await many.json(), { error: { message: /20000 vision tokens a minute/ } })
  t.equal((await ask('a', 1)).headers.get('x-ratelimit-remaining-vision-tokens'), String(20_000 - 2 * used), 'the refused ones cost none')
  t.equal((await post(url + CHAT, chat('?'), as('a'))).status, 200, 'text needs none')
  t.match([(await ask('b', 1)).status, (await ask('b', 1)).headers.get('x-ratelimit-remaining-vision-tokens')], [429, String(100_000 - used)])
})

t.test('requests at once are bounded, also when clients leave', async t => {
  const node = await FakeNode.start(t)
  const { url } = await buildGateway(t, { nodes: [node], options: { keys: [key('a', { concurrency: 1 })] } })
  const leaving = new AbortController()
  node.generateFaults.push('pause')
  await post(url + CHAT, { ...chat('?'), stream: true }, { ...as('a'), signal: leaving.signal })
  const refused = await post(url + CHAT, chat('?'), as('a'))
  t.equal(refused.status, 429)
  t.equal(refused.headers.get('retry-after'), '1')
  leaving.abort()
  await until(async () => (await post(url + CHAT, chat('?'), as('a'))).status === 200, 'its place is free')
})

t.test('what keys use is in the metrics, and no secret is', async t => {
  const { url } = await gateway(t, [key('a', { requests: 1 })])
  await post(url + CHAT, TEXT, as('a'))
  await post(url + CHAT, TEXT, as('a'))
  const text = await (await fetch(`${url}/metrics`)).text()
  t.match(text, /^epd_key_requests_total\{epd_key="a",epd_outcome="ok"\} 1$/m)
  t.match(text, /^epd_key_requests_total\{epd_key="a",epd_outcome="refused"\} 1$/m)
  t.match(text, /^epd_key_tokens_total\{epd_key="a",gen_ai_token_type="input",gen_ai_request_model="m"\} 100$/m)
  t.match(text, /^epd_key_tokens_total\{epd_key="a",gen_ai_token_type="output",gen_ai_request_model="m"\} 11$/m)
  t.notMatch(text, /secret|sha256/)
})

t.test('several gateways count together in Redis, and while it is away as configured, without a hang', async t => {
  const redis = await startRedis(t)
  const keys = [key('a', { requests: 3, tokens: 1_000_000 })]
  const rates = { redis: redis.url, redisTimeout: 3_000 }
  const [open, closed] = [await gateway(t, keys, { rates: { ...rates, whenAway: 'open' } }), await gateway(t, keys, { rates: { ...rates, whenAway: 'closed' } })]
  const ask = async ({ url }: FakeGateway): Promise<Response> => await post(url + CHAT, TEXT, { ...as('a'), signal: AbortSignal.timeout(10_000) })
  t.same([(await ask(open)).status, (await ask(closed)).status, (await ask(open)).status, (await ask(closed)).status, (await ask(open)).status], [200, 200, 200, 429, 429])

  for (const away of ['killed', 'frozen']) {
    if (away === 'killed') await redis.stop()
    else {
      await redis.start()
      await until(async () => (await ask(closed)).status !== 503, 'it is back', 60_000, 50)
      redis.freeze(true)
    }
    const refused = await ask(closed)
    t.equal(refused.status, 503, away)
    t.match(await refused.json(), { error: { code: 'rate_limits_away' } })
    t.ok(refused.headers.get('retry-after'))
    t.ok([200, 429].includes((await ask(open)).status), `${away}: the gateway counts for itself`)
  }
  redis.freeze(false)
  await until(async () => (await ask(closed)).status !== 503, 'it is back', 60_000, 50)
})

t.test('a Redis that says nothing is waited for once, not by each count', async t => {
  const redis = await startRedis(t)
  const rates = new Rates({ redis: redis.url, whenAway: 'closed', redisTimeout: 1_000 }, { debug () {}, info () {}, warn () {}, error () {} })
  t.teardown(() => { rates.close() })
  const take = async (): Promise<string | undefined> => await rates.take(key('a', { requests: 100 }), 'requests', 1).then(() => 'counted', (err: Error) => (err.cause as Error).message)
  await until(async () => await take() === 'counted', 'it counts')
  redis.freeze(true)
  t.not(await take(), 'counted')
  t.match(await take(), /not ready|isn't writeable/, 'the next one is not sent')
  redis.freeze(false)
  await until(async () => await take() === 'counted', 'it is back', 60_000, 50)
})

t.test('a Redis that was never there refuses or lets in at once', async t => {
  const keys = [key('a', { requests: 5 })]
  const nowhere = { redis: 'redis://127.0.0.1:1', redisTimeout: 200 }
  t.equal((await post((await gateway(t, keys, { rates: { ...nowhere, whenAway: 'closed' } })).url + CHAT, TEXT, as('a'))).status, 503)
  t.equal((await post((await gateway(t, keys, { rates: nowhere })).url + CHAT, TEXT, as('a'))).status, 200)
})
