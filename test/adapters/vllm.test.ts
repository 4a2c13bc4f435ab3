import t from 'tap'
import { Client } from 'undici'
import { adapters, createVllm, detectAdapter, vllm, type AdapterNode } from '../../adapters/index.ts'
import { bodyFrom, callWith, dispatcherFor, nodeAt, textOf } from '../helper/adapter-call.ts'
import { parseBody } from '../../plugin/body/index.ts'
import { SmallVllm, type SmallFault } from './small-vllm.ts'

const CHAT = '/v1/chat/completions'
const picture = (url = 'data:image/png;base64,AAAA', more: object = {}): object => ({ type: 'image_url', image_url: { url }, ...more })
const chat = (...content: object[]): object => ({ model: 'tiny', messages: [{ role: 'user', content: [{ type: 'text', text: 'hi' }, ...content] }] })
const failure = async (promise: Promise<unknown>): Promise<unknown> => await promise.then(() => undefined, (error: unknown) => error)

t.test('vllm is found by what /v1/models says, and its card is kept', async t => {
  const call = callWith(dispatcherFor(t))
  const server = await SmallVllm.start(t)
  t.equal(await detectAdapter(nodeAt(server.url), call), 'vllm')
  t.equal(adapters.get('vllm'), vllm)
  const info = await vllm.probe(nodeAt(server.url), call)
  t.match(info, { status: 'healthy', models: ['tiny'], role: 'hybrid', backend: 'vllm 0.32.0', version: '0.32.0', vision: 'full', details: { maxModelLen: 8192, models: [{ id: 'tiny', owned_by: 'vllm', max_model_len: 8192, root: '/models/tiny' }] } })
  t.same(await vllm.probe(nodeAt(server.url), call), info, 'an answer that differs only in its time is no change')
  t.match(await vllm.probe(nodeAt(server.url, { role: 'encoder', vision: 'none' }), call), { role: 'encoder', vision: 'none' }, 'its role is the registered one')
})

t.test('vllm: chat, streams, text and pictures pass as they came', async t => {
  const call = callWith(dispatcherFor(t))
  const server = await SmallVllm.start(t)
  const node = nodeAt(server.url)
  const body = await bodyFrom(chat(picture()))
  const answer = await textOf(await vllm.generate({ node, path: CHAT, body, features: [] }, call))
  t.match(JSON.parse(answer), { choices: [{ message: { content: /I see 1 pictures/ } }] })
  t.same(server.seen[0], JSON.parse(body.bytes.toString()))
  t.match(await textOf(await vllm.generate({ node, path: CHAT, body: await bodyFrom({ ...chat(), stream: true }), features: [] }, call)), /I see 0 pictures.*\[DONE\]/s)
  t.match(await failure(vllm.generate({ node: nodeAt(server.url, { vision: 'none' }), path: CHAT, body, features: [] }, call)), { code: 'REFUSED', message: /media would be lost/ })
})

t.test('vllm: what a client may not write is a 400 that names the member, and nothing is sent', async t => {
  const call = callWith(dispatcherFor(t))
  const server = await SmallVllm.start(t)
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
  await trusting.generate({ node, path: CHAT, body: await bodyFrom(chat({ type: 'prompt_embeds', data: 'AAAA' })), features: [] }, call)
  t.equal(server.seen.length, 1, 'a trusted gateway may send embeddings')
  t.match(await failure(trusting.generate({ node, path: CHAT, body: await bodyFrom(chat(picture(undefined, { uuid: 'x' }))), features: [] }, call)), { code: 'REJECTED' }, 'and no uuid')
  t.match(await failure(vllm.generate({ node, path: CHAT, body: await bodyFrom({ ...chat({ type: 'text', text: 'a uuid, image_embeds' }), with_cache: true }), features: [] }, call)), undefined, 'words of a text, and control fields of other engines, are no matter')
})

t.test('vllm: a 500 of an unreachable picture is the client\'s fault; other 500s are not', async t => {
  const call = callWith(dispatcherFor(t))
  const server = await SmallVllm.start(t)
  const node: AdapterNode = nodeAt(server.url)
  const internal = (message: string): SmallFault => ({ status: 500, error: { message, type: 'InternalServerError', param: null, code: 500 } })
  const meet = async (message: string, ...content: object[]): Promise<unknown> => {
    server.faults.push(internal(message))
    return await failure(vllm.generate({ node, path: CHAT, body: await bodyFrom(chat(...content)), features: [] }, call))
  }
  const refused = 'Cannot connect to host 127.0.0.1:9 ssl:default [Connect call failed (\'127.0.0.1\', 9)]'
  for (const message of [refused, '', "503, message='Service Unavailable', url='http://example.test/a.png'"]) {
    const error = await meet(message, picture('http://127.0.0.1:9/a.png')) as { response?: { body: Buffer } }
    t.match(error, { code: 'REJECTED', fault: 'client', response: { statusCode: 400 } }, message)
    t.match(JSON.parse(error.response!.body.toString()), { error: { param: 'messages[0].content[1]', code: 'media_unreachable' } })
    t.notMatch(error.response!.body.toString(), /127\.0\.0\.1/, 'and no address of the server\'s network')
  }
  t.match(await meet(refused, picture()), { code: 'UNAVAILABLE' }, 'without an address in the request')
  t.match(await meet('EngineCore encountered an issue. See stack trace (above) for the root cause.', picture('http://127.0.0.1:9/a.png')), { code: 'UNAVAILABLE' })
  t.match(await meet('Internal server error', picture('http://127.0.0.1:9/a.png')), { code: 'UNAVAILABLE' })
})

t.test('vllm: no request goes out on a connection that has carried a 500', async t => {
  const server = await SmallVllm.start(t)
  const dispatcher = new Client(server.url)
  t.teardown(async () => { await dispatcher.destroy() })
  const call = callWith(dispatcher)
  const node = nodeAt(server.url)
  const body = await bodyFrom(chat())
  const ask = async (): Promise<unknown> => await textOf(await vllm.generate({ node, path: CHAT, body, features: [] }, call))
  await ask()
  await ask()
  t.equal(server.connections, 1)
  server.faults.push({ status: 500, error: { message: 'x'.repeat(70_000), type: 'InternalServerError', code: 500 } })
  t.match(await failure(ask()), { code: 'UNAVAILABLE', message: /answered 500: xxx/ })
  await ask()
  t.equal(server.connections, 2)
  server.faults.push({ status: 404, error: { message: 'no such model', type: 'NotFoundError', code: 404 } })
  t.match(await failure(ask()), { code: 'REJECTED' })
  await ask()
  t.equal(server.connections, 2, 'other failures keep it')
})
