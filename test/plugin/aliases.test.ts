/** Names that stand for models. */
import t from 'tap'
import { resolveOptions } from '../../plugin/index.ts'
import { reload } from '../../plugin/reload.ts'
import { FakeNode, fakeAdapter } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { until } from '../helper/until.ts'

const CHAT = '/v1/chat/completions'

t.test('an alias is served by its model, text and pictures, and is listed with its card', async t => {
  const nodes = [await FakeNode.start(t, { role: 'encoder', models: ['qwen'] }), await FakeNode.start(t, { models: ['qwen'] })]
  const { url } = await buildGateway(t, { nodes, options: { aliases: { 'gpt-4o': 'qwen', gone: 'nowhere' } } })
  t.equal((await post(url + CHAT, { ...chat('?'), model: 'gpt-4o', temperature: 0.5 })).status, 200)
  t.match(nodes[1]!.generations[0]!.body, { model: 'qwen', temperature: 0.5, messages: Array })
  const seen = await post(url + CHAT, { ...chat('?', pictureUrl(1)), model: 'gpt-4o' })
  t.equal(seen.headers.get('x-epd-plan'), 'e-pd')
  t.same((await (await fetch(`${url}/v1/models`)).json() as { data: Array<{ id: string }> }).data.map(({ id }) => id), ['qwen', 'gpt-4o'])
  t.match(await (await fetch(`${url}/v1/models/gpt-4o`)).json(), { id: 'gpt-4o', object: 'model', root: 'qwen' })
  for (const model of ['gone', 'constructor', '__proto__']) t.equal((await post(url + CHAT, { ...chat('?'), model })).status, 404, model)
})

t.test('another model stands in while the first has no node, and not longer', async t => {
  const [first, second] = [await FakeNode.start(t, { models: ['big'] }), await FakeNode.start(t, { models: ['small'] })]
  const { app, url } = await buildGateway(t, { nodes: [first, second], options: { aliases: { big: ['big', 'small'] } } })
  const ask = async (): Promise<number> => (await post(url + CHAT, { ...chat('?'), model: 'big' })).status
  const state = async (wanted: string): Promise<void> => {
    app.epd.nodes.probe(first.url)
    await until(() => app.epd.nodes.get(first.url)!.state === wanted, `it is ${wanted}`)
  }
  t.equal(await ask(), 200)
  t.same([first.generations.length, second.generations.length], [1, 0])
  await first.close()
  await state('unhealthy')
  t.equal(await ask(), 200)
  t.equal(second.generations[0]!.body.model, 'small')
  await first.listen()
  await state('healthy')
  t.equal(await ask(), 200)
  t.same([first.generations.length, second.generations.length], [2, 1])
})

t.test('a key may use what a name stands for, or may not; a reload takes an alias away', async t => {
  const node = await FakeNode.start(t, { models: ['qwen'] })
  const hash = 'sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b' // "secret"
  const options = { aliases: { a: 'qwen', b: 'qwen' }, keys: [{ name: 'k', hash, models: ['qwen'] }] }
  const { app, url } = await buildGateway(t, { nodes: [node], options })
  const ask = async (model: string): Promise<number> => (await post(url + CHAT, { ...chat('?'), model }, { headers: { 'x-api-key': 'secret' } })).status
  t.same([await ask('a'), await ask('b')], [200, 200])
  const common = { embedded: false, adapters: app.epd.gateway.options.adapters, nodes: [node.spec], routing: app.epd.gateway.options.routing, admission: app.epd.gateway.options.admission }
  t.same(reload(app.epd.gateway, resolveOptions({ ...common, aliases: { a: 'qwen' }, keys: [{ name: 'k', hash, models: ['other'] }] })).changed, ['aliases.b', 'keys'])
  t.same([await ask('a'), await ask('b')], [404, 404])
  reload(app.epd.gateway, resolveOptions({ ...common, adapters: [fakeAdapter], aliases: { a: 'qwen' }, keys: options.keys }))
  t.same([await ask('a'), await ask('b')], [200, 404])
})
