import { createServer } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { mock } from 'node:test'
import t, { type Test } from 'tap'
import { Client } from 'undici'
import { adapters, createVllm, detectAdapter, vllm, type AdapterNode, type NodeInfo } from '../../adapters/index.ts'
import { bodyFrom, callWith, dispatcherFor, nodeAt, textOf } from '../helper/adapter-call.ts'
import { Pins } from '../../adapters/vllm/pins.ts'
import { Written } from '../../adapters/vllm/written.ts'
import { parseBody } from '../../plugin/body/index.ts'
import { pictureUrl } from '../helper/fake-gateway.ts'
import { FakeVllm, SharedFolder } from '../helper/fake-vllm.ts'
import { sameFingerprint } from '../helper/same-fingerprint.ts'
import { dataUrl, picture as png } from '../vllm/pictures.ts'

const CHAT = '/v1/chat/completions'
const picture = (url = dataUrl(png(1, 56)), more: object = {}): object => ({ type: 'image_url', image_url: { url }, ...more })
const chat = (...content: object[]): object => ({ model: 'tiny', messages: [{ role: 'user', content: [{ type: 'text', text: 'hi' }, ...content] }] })
const failure = async (promise: Promise<unknown>): Promise<unknown> => await promise.then(() => undefined, (error: unknown) => error)

t.test('vllm is found by what /v1/models says, and its card is kept', async t => {
  const call = callWith(dispatcherFor(t))
  const server = await FakeVllm.start(t, { server: 'plain' })
  t.equal(await detectAdapter(nodeAt(server.url), call), 'vllm')
  t.equal(adapters.get('vllm'), vllm)
  const info = await vllm.probe(nodeAt(server.url), call)
  t.match(info, { status: 'healthy', models: ['tiny'], role: 'hybrid', backend: 'vllm 0.32.0', version: '0.32.0', vision: 'full', details: { maxModelLen: 8192, models: [{ id: 'tiny', owned_by: 'vllm', max_model_len: 8192, parent: null }] } })
  t.same(await vllm.probe(nodeAt(server.url), call), info, 'an answer that differs only in its time is no change')
  t.match(await vllm.probe(nodeAt(server.url, { role: 'encoder', vision: 'none' }), call), { role: 'encoder', vision: 'none' }, 'its role is the registered one')
})

t.test('vllm: chat, streams, text and pictures pass as they came', async t => {
  const call = callWith(dispatcherFor(t))
  const server = await FakeVllm.start(t, { server: 'plain' })
  const node = nodeAt(server.url)
  const body = await bodyFrom(chat(picture()))
  const answer = await textOf(await vllm.generate({ node, path: CHAT, body, features: [] }, call))
  t.match(JSON.parse(answer), { object: 'chat.completion' })
  t.same(server.chats[0]!.body, JSON.parse(body.bytes.toString()))
  t.match(await textOf(await vllm.generate({ node, path: CHAT, body: await bodyFrom({ ...chat(), stream: true }), features: [] }, call)), /chat\.completion\.chunk.*\[DONE\]/s)
  t.match(await failure(vllm.generate({ node: nodeAt(server.url, { vision: 'none' }), path: CHAT, body, features: [] }, call)), { code: 'REFUSED', message: /media would be lost/ })
})

t.test('vllm: what a client may not write is a 400 that names the member, and nothing is sent', async t => {
  const call = callWith(dispatcherFor(t))
  const server = await FakeVllm.start(t, { server: 'plain' })
  const node = nodeAt(server.url)
  const where = 'messages[0].content[1]'
  const escaped = JSON.stringify(chat(picture(undefined, { uuid: 'x' }))).replace('"uuid"', '"\\u0075uid"')
  const forged: Array<[object, string]> = [
    [chat(picture(undefined, { uuid: '../../x' })), `${where}.uuid`],
    [chat({ type: 'image_url', image_url: null, uuid: 'known' }), `${where}.uuid`],
    [chat({ type: 'image_embeds', image_embeds: { image_grid_thw: [1, 16, 16] } }), `${where}`],
    [chat({ type: 'text', text: 'x', audio_embeds: 'AAAA' }), `${where}.audio_embeds`],
    [chat({ type: 'prompt_embeds', data: 'AAAA' }), where],
    [{ model: 'tiny', messages: [{ role: 'assistant', content: [picture(undefined, { uuid: 'x' })] }] }, 'messages[0].content[0].uuid'],
    [{ ...chat(), ec_transfer_params: {} }, 'ec_transfer_params'],
    [{ ...chat(), kv_transfer_params: { do_remote_prefill: true } }, 'kv_transfer_params'],
    [{ model: 'tiny', prompt: 'x', prompt_embeds: 'AAAA' }, 'prompt_embeds']
  ]
  for (const [body, param] of forged) {
    const error = await failure(vllm.generate({ node, path: CHAT, body: await bodyFrom(body), features: [] }, call)) as { response?: { body: Buffer } }
    t.match(error, { code: 'REJECTED', fault: 'client', response: { statusCode: 400 } }, param)
    t.match(JSON.parse(error.response!.body.toString()), { error: { param, code: 'not_for_clients', type: 'invalid_request_error' } })
  }
  t.same(server.seen, [])
  t.match(await failure(vllm.generate({ node, path: CHAT, body: await parseBody(Buffer.from(escaped)), features: [] }, call)), { code: 'REJECTED' }, 'an escape hides nothing')

  const trusting = createVllm({ embeds: 'allow' })
  t.match(await failure(trusting.generate({ node, path: CHAT, body: await bodyFrom(chat({ type: 'prompt_embeds', data: 'AAAA' })), features: [] }, call)), { message: /answered 400: Cache miss/ })
  t.equal(server.chats.length, 1, 'a trusted gateway may send embeddings')
  t.match(await failure(trusting.generate({ node, path: CHAT, body: await bodyFrom(chat(picture(undefined, { uuid: 'x' }))), features: [] }, call)), { code: 'REJECTED' }, 'and no uuid')
  t.match(await failure(vllm.generate({ node, path: CHAT, body: await bodyFrom({ ...chat({ type: 'text', text: 'a uuid, image_embeds' }), with_cache: true }), features: [] }, call)), undefined, 'words of a text, and control fields of other engines, are no matter')
})

/** A server that answers each chat request with the next failure, else with an answer. */
async function failing (t: Test): Promise<{ readonly url: string, readonly failures: Array<{ status: number, message: string, type: string }>, connections: number }> {
  const failures: Array<{ status: number, message: string, type: string }> = []
  const server = createServer((request, response) => {
    request.resume().on('end', () => {
      const failure = failures.shift()
      const text = JSON.stringify(failure === undefined ? { object: 'chat.completion', choices: [{ index: 0, message: { role: 'assistant', content: '' } }] } : { error: { message: failure.message, type: failure.type, param: null, code: failure.status } })
      response.writeHead(failure?.status ?? 200, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) }).end(text)
    })
  })
  const self = { url: '', failures, connections: 0 }
  server.on('connection', () => { self.connections++ })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  self.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  return self
}

t.test('vllm: a 500 of an unreachable picture is the client\'s fault; other 500s are not', async t => {
  const call = callWith(dispatcherFor(t))
  const server = await failing(t)
  const node: AdapterNode = nodeAt(server.url)
  const meet = async (message: string, ...content: object[]): Promise<unknown> => {
    server.failures.push({ status: 500, message, type: 'InternalServerError' })
    return await failure(vllm.generate({ node, path: CHAT, body: await bodyFrom(chat(...content)), features: [] }, call))
  }
  const refused = 'Cannot connect to host 127.0.0.1:9 ssl:default [Connect call failed (\'127.0.0.1\', 9)]'
  for (const message of [refused, '', "503, message='Service Unavailable', url='http://example.test/a.png'"]) {
    const error = await meet(message, picture('http://127.0.0.1:9/a.png')) as { response?: { body: Buffer } }
    t.match(error, { code: 'REJECTED', fault: 'client', response: { statusCode: 400 } }, message)
    t.match(JSON.parse(error.response!.body.toString()), { error: { param: 'messages[0].content[1]', code: 'media_unreachable' } })
    t.notMatch(error.response!.body.toString(), /127\.0\.0\.1/, 'and no address of the server\'s network')
  }
  t.match(await meet('Cannot load local files without `--allowed-local-media-path`.', picture('file:///etc/passwd')), { code: 'REJECTED' })
  t.match(await meet('Image size (200000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack.', picture()), { code: 'REJECTED', response: { body: /media_too_large/ } })
  t.match(await meet(refused, picture()), { code: 'UNAVAILABLE' }, 'without an address in the request')
  t.match(await meet('EngineCore encountered an issue. See stack trace (above) for the root cause.', picture('http://127.0.0.1:9/a.png')), { code: 'UNAVAILABLE' })
  t.match(await meet('Internal server error', picture('http://127.0.0.1:9/a.png')), { code: 'UNAVAILABLE' })
})

t.test('vllm: no request goes out on a connection that has carried a 500', async t => {
  const server = await failing(t)
  const dispatcher = new Client(server.url)
  t.teardown(async () => { await dispatcher.destroy() })
  const call = callWith(dispatcher)
  const node = nodeAt(server.url)
  const body = await bodyFrom(chat())
  const ask = async (): Promise<unknown> => await textOf(await vllm.generate({ node, path: CHAT, body, features: [] }, call))
  await ask()
  await ask()
  t.equal(server.connections, 1)
  server.failures.push({ status: 500, message: 'x'.repeat(70_000), type: 'InternalServerError' })
  t.match(await failure(ask()), { code: 'UNAVAILABLE', message: /answered 500: xxx/ })
  await ask()
  t.equal(server.connections, 2)
  server.failures.push({ status: 404, message: 'no such model', type: 'NotFoundError' })
  t.match(await failure(ask()), { code: 'REJECTED' })
  await ask()
  t.equal(server.connections, 2, 'other failures keep it')
})

t.test('vllm: an encoder that says where its features lie (ECCPUConnector with NIXL) has them sent in place of pixels', async t => {
  const call = callWith(dispatcherFor(t))
  const folder = new SharedFolder()
  const real = await FakeVllm.start(t, { server: 'e', folder })
  const pd = await FakeVllm.start(t, { server: 'pd', folder })
  const handle = { peer_host: '10.0.0.5', peer_port: 8610, size_bytes: 4505600 }
  // The protocol's shape: recorded nowhere, because this connector needs a GPU.
  const encoder = createServer((request, response) => {
    (async () => {
      const chunks: Buffer[] = []
      for await (const chunk of request as AsyncIterable<Buffer>) chunks.push(chunk)
      const answer = await fetch(real.url + request.url!, { method: 'POST', headers: { 'content-type': 'application/json' }, body: Buffer.concat(chunks) }).then(async answer => await answer.json()) as { ec_transfer_params: Record<string, object> }
      for (const entry of Object.values(answer.ec_transfer_params)) Object.assign(entry, handle)
      response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(answer))
    })().catch(() => { response.destroy() })
  })
  encoder.listen(0, '127.0.0.1')
  await once(encoder, 'listening')
  t.teardown(() => { encoder.closeAllConnections(); encoder.close() })
  const adapter = createVllm()
  const consumer = { ...nodeAt(pd.url), info: await adapter.probe(nodeAt(pd.url), call) }
  const e = { ...nodeAt(`http://127.0.0.1:${(encoder.address() as AddressInfo).port}`, { role: 'encoder' }), info: await adapter.probe(nodeAt(real.url, { role: 'encoder' }), call) }
  const link = await adapter.link(e, consumer, call)
  t.equal(link.transport, 'raw')
  const send = async (value: object): Promise<void> => {
    const body = await bodyFrom(value)
    const features = await adapter.encode({ node: e, items: body.media, body, consumer }, call)
    await textOf(await adapter.generate({ node: consumer, path: CHAT, body, features }, call))
  }
  await send(chat(picture()))
  t.equal(link.transport, 'rewrite')
  const blind = { ...consumer, vision: 'features' as const }
  const both = await bodyFrom(chat(picture(), picture(dataUrl(png(2, 56)))))
  const [one] = await adapter.encode({ node: e, items: both.media.slice(0, 1), body: both, consumer: blind }, call)
  t.match(await failure(adapter.generate({ node: blind, path: CHAT, body: both, features: [one!] }, call)), { code: 'REFUSED', message: /media would be lost/ }, 'without vision weights all must be encoded')
  const all = await bodyFrom(chat(picture()))
  await textOf(await adapter.generate({ node: blind, path: CHAT, body: all, features: await adapter.encode({ node: e, items: all.media, body: all, consumer: blind }, call) }, call))
  const { messages, ec_transfer_params: params } = pd.chats[0]!.body
  const part = (messages![0]!.content as object[])[1] as { uuid: string }
  t.match(part, { type: 'image_embeds', image_embeds: { image_grid_thw: [1, 4, 4] } })
  t.same(params, { [part.uuid]: { item_indices: [0], metadata: { image_grid_thw: [1, 4, 4] }, ...handle } }, 'as the encoder wrote it')
  // A handle that is no longer good: a failure of the request, and its pixels go instead.
  folder.clear()
  await send(chat(picture()))
  t.equal(real.chats.length, 4, 'it is asked each time')
  // With members that shape a picture its key at PD would be another one.
  await send({ ...chat(picture()), media_io_kwargs: {} })
  t.match(JSON.stringify(pd.chats.at(-1)!.body), /base64/)
})

t.test('vllm: a busy server may take its time to answer a probe, as long as the option timeouts.probe gives it', async t => {
  let asked = (): void => {}
  let release = (): void => {}
  const waiting = new Promise<void>(resolve => { asked = resolve })
  const busy = new Promise<void>(resolve => { release = resolve })
  const real = await FakeVllm.start(t, { server: 'pd' })
  const server = createServer((req, res) => {
    asked()
    busy.then(async () => await fetch(real.url + req.url!)).then(async answer => { res.writeHead(answer.status, { 'content-type': 'application/json' }).end(await answer.text()) }, () => { res.destroy() })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  mock.timers.enable({ apis: ['setTimeout'] })
  t.teardown(() => { mock.timers.reset() })
  const probe = vllm.probe(nodeAt(`http://127.0.0.1:${(server.address() as AddressInfo).port}`), callWith(dispatcherFor(t)))
  await waiting
  mock.timers.tick(14_000)
  release()
  t.match(await probe, { status: 'healthy' })
})

t.test('vllm: a handle that is older than its lease is thrown away before D sees it', async t => {
  const call = callWith(dispatcherFor(t))
  const d = await FakeVllm.start(t, { server: 'd' })
  const node = nodeAt(d.url, { role: 'decode' })
  const body = await bodyFrom(chat())
  const handoff = { node: 'http://p', lease: 'r', wire: { params: { do_remote_prefill: true }, at: performance.now() - 26_000, edits: {} } }
  t.match(await failure(vllm.generate({ node, path: CHAT, body, features: [], handoff }, call)), { code: 'KV_GONE', fault: 'none' })
  t.same(d.chats, [])
})

t.test('vllm: what is known of encoders is bounded, ages, and ends with their process', async t => {
  let now = 0
  const written = new Written(() => now)
  const info: NodeInfo = { status: 'healthy', models: [], role: 'encoder', backend: 'vllm', produces: [], accepts: [], vision: 'full' }
  const e = nodeAt('http://e', { role: 'encoder', info })
  written.add(e, 'a')
  t.ok(written.has(e, 'a'))
  t.notOk(written.has({ ...e, info: { ...info } }, 'a'), 'another process')
  t.notOk(written.has(nodeAt('http://f', { info: { ...info } }), 'a'))
  now = 30 * 60_000
  t.notOk(written.has(e, 'a'))
  written.add(e, 'a')
  for (let i = 0; i < 16_384; i++) written.add(e, String(i))
  t.notOk(written.has(e, 'a'), 'the oldest leaves')
  t.ok(written.has(e, '0'))
})

t.test("vllm: a picture's name covers all of its bytes: one that has the fingerprint of another has a name of its own", async t => {
  const url = pictureUrl(1, 20_000)
  const other = sameFingerprint(url)
  let asked = 0
  const named = async (url: string, pins: Pins): Promise<string | undefined> => {
    const body = await parseBody(Buffer.from(JSON.stringify({ model: 'm', messages: [{ role: 'user', content: [{ type: 'text', text: String(asked++) }, { type: 'image_url', image_url: { url } }] }] })))
    return pins.pin(body.media[0]!, body, 'http://e:1', undefined).uuid
  }
  const pins = new Pins('secret')
  const name = await named(url, pins)
  t.match(name, /^[0-9a-f]{64}$/)
  t.not(await named(other, pins), name)
  t.equal(await named(url, pins), name)
  t.equal(await named(url, new Pins('secret')), name, 'gateways with one secret agree')
  t.not(await named(url, new Pins(undefined)), name)
})
