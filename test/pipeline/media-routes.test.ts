/** Bodies with media, in any spelling and on any route, go where media are seen; EPD serves chats, responses and messages alike. */
import t from 'tap'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, post } from '../helper/fake-gateway.ts'
import { APART_PLACES, LOOSE_MEDIA, NONE, ONE, PLACES } from '../helper/media-spellings.ts'

t.test('no body with media reaches a node that cannot see', async t => {
  const [seer, blind] = await Promise.all([FakeNode.start(t, { vision: 'full' }), FakeNode.start(t, { vision: 'none' })])
  const { url } = await buildGateway(t, { nodes: [blind, seer] })
  const ask = async (route: string, body: object): Promise<string> => {
    const answer = await post(`${url}${route}`, { model: 'vlm', ...body })
    await answer.arrayBuffer()
    return `${answer.status} ${answer.headers.get('x-epd-plan')} ${answer.headers.get('x-epd-reason')}`
  }
  for (const [name, part] of Object.entries(ONE)) t.match(await ask('/v1/chat/completions', { messages: [{ role: 'user', content: [part] }] }), /^200 hybrid/, name)
  for (const [name, { member, wrap, routes }] of Object.entries({ ...PLACES, ...APART_PLACES })) {
    for (const route of routes) t.match(await ask(route, { [member]: wrap([ONE.image]) }), /^200 hybrid/, `${name} at ${route}`)
  }
  for (const [items, more] of LOOSE_MEDIA) if (items > 0) t.match(await ask('/v1/completions', { prompt: 'x', ...more }), /^200 hybrid/, JSON.stringify(more))
  t.same(blind.generations, [])
  for (let i = 0; i < 4; i++) await ask('/v1/chat/completions', { messages: [{ role: 'user', content: Object.values(NONE) }] })
  t.ok(blind.generations.length > 0, 'text goes anywhere')
})

t.test('chats, responses and messages are encoded apart and spliced, byte for byte', async t => {
  const [encoder, engine] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t, { vision: 'features' })])
  const { url } = await buildGateway(t, { nodes: [encoder, engine] })
  for (const [name, { member, wrap, routes }] of Object.entries(PLACES)) {
    for (const route of routes) {
      const body = { model: 'vlm', [member]: wrap([{ type: 'text', text: 'a' }, ONE['image with source, base64'], ONE.input_image]) }
      const answer = await post(`${url}${route}`, body)
      t.same([answer.status, answer.headers.get('x-epd-plan')], [200, 'e-pd'], `${name} at ${route}: ${await answer.text()}`)
      const { path, body: { features, ...rest } } = engine.generations.at(-1)!
      t.same([path, rest, (features as unknown[]).length], [route, body, 2])
    }
  }
})

t.test('media that only a language model can read are never sent to an encoder', async t => {
  const [encoder, seer] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t, { vision: 'full' })])
  const { url } = await buildGateway(t, { nodes: [encoder, seer], options: { bypass: 'never' } })
  for (const [name, reason] of [['image_embeds', 'embeddings'], ['null with a uuid', 'media without a URL'], ['input_image with a file', 'media without a URL']] as const) {
    const answer = await post(`${url}/v1/chat/completions`, { model: 'vlm', messages: [{ role: 'user', content: [ONE.image_url, ONE[name]] }] })
    t.same([answer.status, answer.headers.get('x-epd-plan'), answer.headers.get('x-epd-reason')], [200, 'hybrid', reason], name)
    await answer.arrayBuffer()
  }
  t.same(encoder.seen.filter(({ path }) => path === '/encode'), [])
})
