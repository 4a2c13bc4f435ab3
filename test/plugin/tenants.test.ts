import t, { type Test } from 'tap'
import type { EngineRole } from '../../engines/service/engine-service.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { startScripted, type ScriptedEngine } from '../helper/scripted-engine.ts'
import { until } from '../helper/until.ts'

const PATH = '/v1/chat/completions'
const MIGRATION = { protocol: 1, epoch: 4711, lease: 'kv1', remote_session_id: 17, remote_block_ids: [3], remote_token_id: 7, token_ids: [1, 2] }

interface Setup { readonly ask: (text: string, urls: string[], headers: Record<string, string>, more?: object) => Promise<string>, readonly engines: readonly ScriptedEngine[] }

/** Our engines' own api_server and adapter, behind a gateway that separates tenants by a header. */
async function setUp (t: Test, roles: readonly EngineRole[], vision?: 'full'): Promise<Setup> {
  const nodes = await Promise.all(roles.map(async role => ({ role, ...await startScripted(t, role) })))
  for (const { role, engine } of nodes) {
    if (vision !== undefined && role !== 'encoder') engine.more = { vision }
    if (role === 'prefill') engine.answer = async () => ({ status: 200, json: { object: 'chat.completion', migration_request: MIGRATION } })
    if (role === 'encoder') engine.answer = async () => ({ status: 200, json: { encoder_result: [{ message: 0, part: 0, lease: 'f1', num_tokens: 8 }] } })
  }
  const { app, url } = await buildGateway(t, { options: { tenant: 'x-tenant', nodes: nodes.map(({ url, role }) => ({ url, role, adapter: 'pytorch' })) } })
  await until(() => {
    const known = app.epd.nodes.snapshot().nodes
    return known.every(({ state, links }) => state === 'healthy' && [...links.values()].every(link => link.state === 'linked')) && (known.length === 1 || known.some(({ links }) => links.size > 0))
  }, 'the nodes are healthy and linked')
  const ask: Setup['ask'] = async (text, urls, headers, more = {}) => {
    const response = await post(url + PATH, { ...chat(text, ...urls), model: 'fake-vlm', ...more }, { headers })
    await response.text()
    return `${response.status} ${response.headers.get('x-epd-plan')}`
  }
  return { ask, engines: nodes.map(({ engine }) => engine) }
}

const ALICE = { 'x-tenant': 'alice' }

t.test('a hybrid node that encodes gets the tenant of the pictures', async t => {
  const { ask, engines: [hybrid] } = await setUp(t, ['hybrid'], 'full')
  t.equal(await ask('?', [pictureUrl(1)], ALICE), '200 hybrid')
  t.equal(await ask('?', [], ALICE), '200 pd')
  t.strictSame(hybrid!.calls.map(call => call.tenant), ['alice', 'alice'])
})

t.test('encoder and language model get the same tenant', async t => {
  const { ask, engines: [encoder, pd] } = await setUp(t, ['encoder', 'hybrid'])
  t.equal(await ask('?', [pictureUrl(1)], ALICE), '200 e-pd')
  t.strictSame([encoder, pd].map(engine => engine!.calls.map(call => call.tenant)), [['alice'], ['alice']])
})

t.test('so are prefill and decode', async t => {
  const { ask, engines: [p, d] } = await setUp(t, ['prefill', 'decode'])
  t.equal(await ask('?', [], ALICE), '200 p-d')
  t.strictSame([p, d].map(engine => engine!.calls.map(call => call.tenant)), [['alice'], ['alice']])
})

t.test('a client cannot name a tenant by itself', async t => {
  const { ask, engines: [hybrid] } = await setUp(t, ['hybrid'], 'full')
  await ask('?', [], {}, { epd_tenant: 'alice' })
  await ask('?', [], { 'x-tenant': 'mallory' }, { epd_tenant: 'alice' })
  t.strictSame(hybrid!.calls.map(call => call.tenant), [undefined, 'mallory'])
})
