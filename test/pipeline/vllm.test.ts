/** Requests through the gateway to vLLM servers as they were recorded. What kills one of those kills these. */
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import { createVllm } from '../../adapters/index.ts'
import epd, { type EpdOptions, type Gateway } from '../../plugin/index.ts'
import { bodyFrom, callWith, dispatcherFor, nodeAt } from '../helper/adapter-call.ts'
import { FakeVllm, KvBlocks, SharedFolder, type VllmServer } from '../helper/fake-vllm.ts'
import { post } from '../helper/fake-gateway.ts'
import { chat, dataUrl, imagePart, picture, textPart } from '../vllm/pictures.ts'
import { until } from '../helper/until.ts'

const ROLES = { plain: 'hybrid', e: 'encoder', pd: 'hybrid', p: 'prefill', d: 'decode' } as const

interface Fixture {
  readonly gateway: Gateway
  readonly folder: SharedFolder
  readonly kv: KvBlocks
  readonly servers: readonly FakeVllm[]
  ask (body: object, headers?: Record<string, string>): Promise<Asked>
  /** What a plain server answers. */
  plain (body: object): Promise<unknown>
}
interface Asked { readonly status: number, readonly plan: string | null, readonly reason: string | null, readonly encoders: string | null, readonly json: unknown, readonly text: string }

async function fixture (t: Test, names: readonly VllmServer[], options: EpdOptions = {}, embeds?: boolean): Promise<Fixture> {
  const folder = new SharedFolder()
  const kv = new KvBlocks()
  const servers = await Promise.all(names.map(server => FakeVllm.start(t, { server, folder, kv, ...(embeds === undefined ? {} : { embeds }) })))
  const reference = await FakeVllm.start(t, { server: 'plain' })
  const app = Fastify({ forceCloseConnections: true })
  t.teardown(() => app.close())
  await app.register(epd, { embedded: false, bypass: 'never', nodes: servers.map(({ url, server }) => ({ url, role: ROLES[server] })), ...options })
  const url = await app.listen({ port: 0, host: '127.0.0.1' })
  await app.epd.nodes.waitFor(({ nodes }) => nodes.every(node => node.state === 'healthy' && [...node.links.values()].every(link => link.state === 'linked')) && nodes.length === names.length, { signal: AbortSignal.timeout(10_000) })
  return {
    gateway: app.epd.gateway as Gateway,
    folder,
    kv,
    servers,
    ask: async (body, headers = {}) => {
      const answer = await post(`${url}/v1/chat/completions`, body, { headers })
      const text = await answer.text()
      return { status: answer.status, plan: answer.headers.get('x-epd-plan'), reason: answer.headers.get('x-epd-reason'), encoders: answer.headers.get('x-epd-encoders'), text, json: text.startsWith('{') ? JSON.parse(text) : undefined }
    },
    plain: async body => tokens(await (await post(`${reference.url}/v1/chat/completions`, body)).json())
  }
}

function tokens (answer: unknown): unknown {
  return (answer as { choices: Array<{ token_ids: unknown }> }).choices.map(choice => choice.token_ids)
}

const ask = (seeds: readonly number[], more: object = {}): object => chat([...seeds.map(seed => imagePart(dataUrl(picture(seed, 56 + 28 * (seed % 4))))), textPart(`what is in ${seeds.length}?`)], { return_token_ids: true, ...more })
const uuidsOf = ({ chats }: FakeVllm, i = -1): Array<string | undefined> => {
  const content = chats.at(i)!.body.messages![0]!.content
  return typeof content === 'string' ? [] : content.filter(part => part.type !== 'text').map(part => part.uuid)
}

t.test('E -> PD: PD loads what E has written, and answers as a plain server', async t => {
  const f = await fixture(t, ['e', 'pd'])
  const [e, pd] = f.servers as [FakeVllm, FakeVllm]
  for (const seeds of [[1], [2, 3, 4], [5, 5], [6, 7, 8, 9]]) {
    const answer = await f.ask(ask(seeds))
    t.match(answer, { status: 200, plan: 'e-pd' })
    t.same(tokens(answer.json), await f.plain(ask(seeds)))
  }
  t.equal(e.chats.length, 4, 'one call for all pictures of a request')
  t.notOk(e.chats.some(({ body }) => body.stream === true))
  t.equal(f.folder.reads, 9, 'PD has looked at none itself, and loads a picture once')
  t.match(uuidsOf(pd), Array.from({ length: 4 }, () => /^[0-9a-f]{64}$/))
  t.same(uuidsOf(pd), uuidsOf(e))
  t.match((await f.ask(ask([1], { stream: true }))).text, /data: \[DONE\]/)
  t.equal(e.chats.length, 4, 'a repeated picture costs no call to E')
  t.match(f.gateway.registry.status()[e.url], { links: { [pd.url]: { state: 'linked', transport: 'raw' } } })
})

t.test('files gone, an encoder away: PD encodes by itself', async t => {
  const f = await fixture(t, ['e', 'pd'])
  const [e, pd] = f.servers as [FakeVllm, FakeVllm]
  await f.ask(ask([1]))
  f.folder.clear()
  await pd.kill()
  await pd.listen()
  await until(() => f.gateway.registry.get(pd.url)?.state === 'healthy' && f.gateway.registry.snapshot().link(e.url, pd.url) === 'linked', 'PD is back')
  const answer = await f.ask(ask([1]))
  t.match(answer, { status: 200, plan: 'e-pd' }, 'E is not asked again')
  t.same(tokens(answer.json), await f.plain(ask([1])))
  // A kept connection that is reset is tried once more on a fresh one.
  e.faults.push('reset', 'reset')
  const other = await f.ask(ask([2]))
  t.match(other, { status: 200, plan: 'hybrid', reason: 'encoders failed' })
  t.same(tokens(other.json), await f.plain(ask([2])))
  t.same(uuidsOf(pd), [undefined], 'under its own name: a file that E may still write is not read')
  e.faults.push('die')
  const before = pd.chats.length
  t.match(await f.ask(ask([3])), { status: 502, json: { error: { code: 'node_died' } } }, 'a picture under which an encoder dies goes to no other node')
  t.equal(pd.chats.length, before)
})

t.test('an encoder that has restarted is asked again', async t => {
  const f = await fixture(t, ['e', 'pd'])
  const [e] = f.servers as [FakeVllm]
  await f.ask(ask([1]))
  await e.kill()
  f.gateway.registry.probe(e.url)
  await until(() => f.gateway.registry.get(e.url)?.state === 'unhealthy', 'E is away')
  await e.listen()
  f.gateway.registry.probe(e.url)
  await until(() => [...f.gateway.registry.get(e.url)!.links.values()].some(link => link.state === 'linked') && f.gateway.registry.get(e.url)?.state === 'healthy', 'E is back')
  t.match(await f.ask(ask([1])), { status: 200, plan: 'e-pd' })
  t.equal(e.chats.length, 2)
})

t.test('two tenants share no name, two gateways with one secret do', async t => {
  const options: EpdOptions = { tenant: 'x-tenant', vllm: { secret: 's' } }
  const f = await fixture(t, ['e', 'pd'], options)
  const [e, pd] = f.servers as [FakeVllm, FakeVllm]
  for (const tenant of ['a', 'b', 'a']) await f.ask(ask([1]), { 'x-tenant': tenant })
  const [a, b, again] = [uuidsOf(pd, 0), uuidsOf(pd, 1), uuidsOf(pd, 2)]
  t.not(a[0], b[0])
  t.same(a, again)
  t.equal(e.chats.length, 2)
  const salts = pd.chats.map(({ body }) => (body as { cache_salt?: string }).cache_salt)
  t.equal(new Set(salts).size, 2, 'nor a prefix of the prompt')
  const nodes = f.servers.map(({ url, server }) => ({ url, role: ROLES[server] }))
  const other = Fastify()
  t.teardown(() => other.close())
  await other.register(epd, { embedded: false, bypass: 'never', nodes, ...options })
  await other.ready()
  await other.epd.nodes.waitFor(({ nodes }) => nodes.every(node => [...node.links.values()].some(link => link.state === 'linked')), { signal: AbortSignal.timeout(10_000) })
  await other.inject({ method: 'POST', url: '/v1/chat/completions', headers: { 'x-tenant': 'a' }, payload: ask([1]) })
  t.same(uuidsOf(pd), a)
})

t.test('a picture behind an address has the name that vLLM gives its bytes: they may change between two downloads', async t => {
  const f = await fixture(t, ['e', 'pd'])
  const [, pd] = f.servers as [FakeVllm, FakeVllm]
  const source = Fastify()
  t.teardown(() => source.close())
  let side = 56
  source.get('/a.png', async (_request, reply) => {
    side += 28
    return await reply.type('image/png').send(picture(1, side))
  })
  const url = `${await source.listen({ port: 0, host: '127.0.0.1' })}/a.png`
  for (let i = 0; i < 3; i++) {
    t.match(await f.ask(chat([imagePart(url), textPart('?')])), { status: 200, plan: 'e-pd' })
    t.same(uuidsOf(pd), [undefined])
  }
  t.equal(pd.deaths, 0)
  const away = await f.ask(chat([imagePart('http://127.0.0.1:9/a.png'), textPart('?')]))
  t.match(away, { status: 400, json: { error: { code: 'media_unreachable', param: 'messages[0].content[0]' } } })
  t.match(f.gateway.registry.status()[f.servers[0]!.url], { breakers: { encode: 'closed' } })
})

t.test('a part that means one picture to the gateway means the same to vLLM', async t => {
  const f = await fixture(t, ['e', 'pd'])
  const [e, pd] = f.servers as [FakeVllm, FakeVllm]
  const [one, other] = [dataUrl(picture(1, 56)), dataUrl(picture(2, 112))]
  for (const url of [one, other]) await f.ask(chat([{ type: 'image_url', image_url: { url, data: one }, video_url: { url: one } }, textPart('?')]))
  for (const { chats } of [e, pd]) t.same(chats.map(({ body }) => Object.keys((body.messages![0]!.content as object[])[0]!)), [['type', 'image_url', 'uuid'], ['type', 'image_url', 'uuid']])
  t.equal(e.deaths + pd.deaths, 0)
  const kwargs = await f.ask({ ...ask([3]), media_io_kwargs: { video: { num_frames: 4 } } })
  t.match(kwargs, { status: 200 })
  t.same(uuidsOf(pd), [undefined], 'with members that shape the picture vLLM names it')
})

t.test('a client forges nothing, whatever the plan', async t => {
  const f = await fixture(t, ['e', 'p', 'd'])
  const seed = chat([imagePart(dataUrl(picture(1, 56)), '../../x'), textPart('?')])
  t.match(await f.ask(seed), { status: 400, json: { error: { param: 'messages[0].content[0].uuid', code: 'not_for_clients' } } })
  t.match(await f.ask({ ...ask([1]), kv_transfer_params: { do_remote_prefill: true } }), { status: 400, json: { error: { param: 'kv_transfer_params' } } })
  t.same(f.servers.map(server => server.chats.length), [0, 0, 0])
})

t.test('E -> P -> D answers as a plain server; D gets pixels, and P\'s handle as it came', async t => {
  const f = await fixture(t, ['e', 'p', 'd'])
  const [e, p, d] = f.servers as [FakeVllm, FakeVllm, FakeVllm]
  for (const seeds of [[1], [2, 3], []]) {
    const answer = await f.ask(ask(seeds))
    t.match(answer, { status: 200, plan: seeds.length > 0 ? 'e-p-d' : 'p-d' })
    t.same(tokens(answer.json), await f.plain(ask(seeds)))
  }
  t.match((await f.ask(ask([1], { stream: true, stream_options: { include_usage: true }, max_completion_tokens: 4, min_tokens: 2 }))).text, /\[DONE\]/)
  t.match(p.chats.at(-1)!.body, { stream: false, max_tokens: 1, max_completion_tokens: 1, kv_transfer_params: { do_remote_decode: true } })
  t.notOk('stream_options' in p.chats.at(-1)!.body)
  t.match(d.chats.at(-1)!.body, { max_completion_tokens: 4, stream: true, kv_transfer_params: { do_remote_prefill: true, remote_port: Number(new URL(p.url).port) + 100 } })
  t.same(uuidsOf(d), uuidsOf(p))
  t.equal(e.chats.length, 2)
})

t.test('P away or its blocks gone: D gets the raw body, and answers right', async t => {
  const f = await fixture(t, ['e', 'p', 'd'])
  const [, p, d] = f.servers as [FakeVllm, FakeVllm, FakeVllm]
  p.faults.push('reset', 'reset')
  const answer = await f.ask(ask([1]))
  t.match(answer, { status: 200, plan: 'hybrid' })
  t.same(tokens(answer.json), await f.plain(ask([1])))
  t.notOk('kv_transfer_params' in d.chats.at(-1)!.body)
  // P has restarted between its answer and D's pull.
  let release = (): void => {}
  d.faults.push({ hold: new Promise(resolve => { release = resolve }) })
  const asked = f.ask(ask([2]))
  await until(() => d.chats.length === 2, 'D has the request')
  f.kv.engines.clear()
  release()
  const late = await asked
  t.match(late, { status: 200 })
  t.same(tokens(late.json), await f.plain(ask([2])))
  t.equal(d.deaths, 0)
})

t.test('rewritten by option: PD gets the shape of the features in place of pixels, and answers as a plain server', async t => {
  const f = await fixture(t, ['e', 'pd'], { vllm: { handoff: 'rewrite' } })
  const [e, pd] = f.servers as [FakeVllm, FakeVllm]
  for (const seeds of [[1], [2, 3], [1, 1]]) {
    const answer = await f.ask(ask(seeds))
    t.match(answer, { status: 200, plan: 'e-pd' })
    t.same(tokens(answer.json), await f.plain(ask(seeds)))
  }
  t.equal(e.chats.length, 3, 'the encoder is asked each time: without the features PD would end')
  for (const { body } of pd.chats) {
    t.notMatch(JSON.stringify(body), /base64/)
    const uuids = Object.keys(body.ec_transfer_params!)
    t.match(body.ec_transfer_params, Object.fromEntries(uuids.map(uuid => [uuid, { metadata: { image_grid_thw: [1, Number, Number] } }])))
    t.same(new Set((body.messages![0]!.content as ReadonlyArray<{ uuid?: string }>).flatMap(part => part.uuid ?? [])), new Set(uuids))
  }
  t.match(f.gateway.registry.status()[e.url], { links: { [pd.url]: { transport: 'rewrite' } } })
  // Assistants' pictures count, and a type that only vLLM knows is no media to the gateway: the two may not be mixed.
  const mixed = chat([imagePart(dataUrl(picture(4, 56))), { type: 'input_image', image_url: dataUrl(picture(5, 56)) }, textPart('?')])
  t.match(await f.ask(mixed), { status: 200, plan: 'e-pd' }, 'what PD does not take rewritten it takes as it came')
  t.equal(pd.deaths, 0)
})

t.test('a PD that takes no embeddings is found out once, and gets pixels from then on', async t => {
  const f = await fixture(t, ['e', 'pd'], { vllm: { handoff: 'rewrite' } }, false)
  const [e, pd] = f.servers as [FakeVllm, FakeVllm]
  for (const seeds of [[1], [2]]) {
    const answer = await f.ask(ask(seeds))
    t.match(answer, { status: 200, plan: 'e-pd' })
    t.same(tokens(answer.json), await f.plain(ask(seeds)))
  }
  t.equal(pd.chats.length, 3)
  t.match(f.gateway.registry.status()[e.url], { links: { [pd.url]: { transport: 'raw' } } })
  t.match(f.gateway.registry.status()[pd.url], { breakers: { decode: 'closed' } })
})

t.test('E -> P -> D rewritten: P gets the shape, D pixels', async t => {
  const f = await fixture(t, ['e', 'p', 'd'], { vllm: { handoff: 'rewrite' } })
  const [, p, d] = f.servers as [FakeVllm, FakeVllm, FakeVllm]
  const answer = await f.ask(ask([1, 2]))
  t.match(answer, { status: 200, plan: 'e-p-d' })
  t.same(tokens(answer.json), await f.plain(ask([1, 2])))
  t.match(JSON.stringify(p.chats[0]!.body), /image_embeds/)
  t.notMatch(JSON.stringify(d.chats[0]!.body), /embeds|ec_transfer/)
})

t.test('while an encoder is busy the language model encodes its part of a request', async t => {
  const f = await fixture(t, ['e', 'pd'], { bypass: 'auto', routing: { smallItem: 0 } })
  const [e, pd] = f.servers as [FakeVllm, FakeVllm]
  await f.ask(ask([3]))
  let release = (): void => {}
  e.faults.push({ hold: new Promise(resolve => { release = resolve }) })
  const held = f.ask(ask([7, 11, 27]))
  await until(() => e.chats.length === 2, 'three pictures are at the encoder')
  const answer = await f.ask(ask([15, 19, 23]))
  t.match(answer, { status: 200, plan: 'e-pd', reason: '1 item on 1 encoder, 2 on the language model' })
  t.same(tokens(answer.json), await f.plain(ask([15, 19, 23])))
  t.match(uuidsOf(pd), [undefined, undefined, String])
  t.equal(answer.encoders, [pd.url, pd.url, e.url].join(','))
  t.match(await f.ask(ask([3])), { plan: 'e-pd', reason: '1 item on 1 encoder' }, 'what the encoder has costs nothing')
  t.match(await f.ask(ask([4])), { plan: 'hybrid', reason: 'encoders busy' })
  release()
  t.match(await held, { status: 200, plan: 'e-pd' })
})

t.test('audio and video are items like pictures', async t => {
  const call = callWith(dispatcherFor(t))
  const bodies: Array<{ messages: Array<{ content: Array<Record<string, unknown>> }> }> = []
  const server = Fastify()
  t.teardown(() => server.close())
  server.post('/v1/chat/completions', async request => {
    bodies.push(request.body as typeof bodies[number])
    return { object: 'chat.completion', choices: [{ index: 0, message: { role: 'assistant', content: '' }, finish_reason: 'stop' }], ec_transfer_params: null }
  })
  const url = await server.listen({ port: 0, host: '127.0.0.1' })
  const body = await bodyFrom(chat([
    { type: 'audio_url', audio_url: { url: 'data:audio/wav;base64,AAAA' } },
    { type: 'video_url', video_url: { url: 'data:video/mp4;base64,AAAA' } },
    { type: 'input_audio', input_audio: { data: 'AAAA', format: 'wav' } },
    { type: 'video_url', video_url: { url: 'http://a.test/b.mp4' } },
    textPart('?')
  ]))
  t.same(body.media.map(item => item.modality), ['audio', 'video', 'audio', 'video'])
  const adapter = createVllm({ secret: 's' })
  const [node, consumer] = [nodeAt(url, { role: 'encoder' }), nodeAt(url)]
  const features = await adapter.encode({ node, items: body.media, body, consumer }, call)
  await adapter.generate({ node: consumer, path: '/v1/chat/completions', body, features }, call)
  const [encoded, generated] = bodies.map(({ messages }) => messages[0]!.content)
  t.same(generated!.slice(0, 4), encoded, 'the same parts under the same names')
  const [audio, video, input, remote] = encoded!
  t.match(audio, { type: 'audio_url', audio_url: { url: 'data:audio/wav;base64,AAAA' }, uuid: /^[0-9a-f]{64}$/ })
  t.match(video, { type: 'video_url', uuid: /^[0-9a-f]{64}$/ })
  t.not(audio!.uuid, video!.uuid)
  t.same(input, { type: 'input_audio', input_audio: { data: 'AAAA', format: 'wav' } })
  t.same(remote, { type: 'video_url', video_url: { url: 'http://a.test/b.mp4' } })
})

t.test('a file cut short ends the server that reads it, once: then the picture is encoded again under another name', async t => {
  const f = await fixture(t, ['e', 'pd'], { retries: 0 })
  const [e, pd] = f.servers as [FakeVllm, FakeVllm]
  await f.ask(ask([1]))
  const [first] = uuidsOf(pd)
  f.folder.truncate()
  await pd.kill()
  const back = async (): Promise<void> => {
    f.gateway.registry.probe(pd.url)
    await until(() => f.gateway.registry.get(pd.url)?.state === 'unhealthy', 'PD is away')
    await pd.listen()
    f.gateway.registry.probe(pd.url)
    await until(() => f.gateway.registry.get(pd.url)?.state === 'healthy' && f.gateway.registry.snapshot().link(e.url, pd.url) === 'linked', 'PD is back')
  }
  await back()
  t.ok((await f.ask(ask([1]))).status >= 502)
  await until(() => !pd.alive, 'PD has ended')
  await back()
  const answer = await f.ask(ask([1]))
  t.match(answer, { status: 200, plan: 'e-pd' })
  t.same(tokens(answer.json), await f.plain(ask([1])))
  t.not(uuidsOf(pd)[0], first)
  t.equal(pd.deaths, 1)
})
