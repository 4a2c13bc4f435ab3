/**
 * Records what real vLLM servers answer, byte for byte, into test/fixtures/vllm, where the fake server reads it:
 *
 *   node dist/test/vllm/record.js OUT_DIR plain=http://127.0.0.1:9100 e=... pd=... p=... d=...
 *
 * Servers that are not given are left out. The last requests to `pd` and `p` kill them.
 */
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { exchange, jsonOf, statusOf, type Exchange, type Sent } from './exchange.ts'
import { chat, dataUrl, embedsPart, imagePart, picture, textPart } from './pictures.ts'

const CHAT = '/v1/chat/completions'
const PREFILL = { do_remote_decode: true, do_remote_prefill: false, remote_engine_id: null, remote_block_ids: null, remote_host: null, remote_port: null }
const SMALL = dataUrl(picture(1, 56))
const WIDE = dataUrl(picture(2, 112, 56))
const ask = { max_tokens: 4, temperature: 0, return_token_ids: true }

const [out, ...given] = process.argv.slice(2)
if (out === undefined) throw new Error('usage: record.js OUT_DIR NAME=URL...')
const urls = new Map(given.map(pair => pair.split('=', 2) as [string, string]))
const run = `run${Date.now().toString(36)}`
/** A uuid that no earlier run has used: files outlive servers. */
const key = (name: string): string => `${run}-${name}`

const seen: Record<string, Record<string, Exchange>> = {}

async function record (server: string, name: string, sent: Sent): Promise<Exchange | undefined> {
  const url = urls.get(server)
  if (url === undefined) return undefined
  const one = withoutPath(await exchange(url, sent))
  ;(seen[server] ??= {})[name] = one
  process.stdout.write(`${server.padEnd(8)} ${name.padEnd(24)} ${statusOf(one)} ${one.closedAfterMs === null ? '' : `closed after ${one.closedAfterMs} ms`}\n`)
  return one
}

/** /v1/models says where the model lies on this machine. */
function withoutPath (one: Exchange): Exchange {
  const body = one.body.replace(/"root":"[^"]*"/, '"root":"/models/tiny"')
  return body === one.body ? one : { ...one, body, head: one.head.replace(/content-length: \d+/, `content-length: ${body.length}`) }
}

async function common (server: string): Promise<void> {
  await record(server, 'health', { path: '/health' })
  await record(server, 'models', { path: '/v1/models' })
  await record(server, 'version', { path: '/version' })
  await record(server, 'unknown-model', { path: CHAT, body: { ...chat([textPart('hello')], ask), model: 'missing' } })
  await record(server, 'unknown-route', { path: '/distserve/engine_info' })
  await record(server, 'not-json', { path: CHAT, body: [1] })
}

async function answers (server: string): Promise<void> {
  await record(server, 'text', { path: CHAT, body: chat([textPart('what is it')], ask) })
  await record(server, 'text-stream', { path: CHAT, body: chat([textPart('what is it')], { ...ask, stream: true, stream_options: { include_usage: true } }) })
  await record(server, 'picture', { path: CHAT, body: chat([imagePart(SMALL), textPart('what is it')], ask) })
  await record(server, 'picture-stream', { path: CHAT, body: chat([imagePart(SMALL), textPart('what is it')], { ...ask, stream: true }) })
  await record(server, 'bad-picture', { path: CHAT, body: chat([imagePart('data:image/png;base64,AAAA'), textPart('what is it')], ask) })
  await record(server, 'unreachable-picture', { path: CHAT, body: chat([imagePart('http://127.0.0.1:9/x.png')], ask), watchMs: 1000 })
  await record(server, 'local-file', { path: CHAT, body: chat([imagePart('file:///etc/passwd')], ask), watchMs: 1000 })
  await record(server, 'cache-miss', { path: CHAT, body: chat([imagePart(null, key('never')), textPart('what is it')], ask) })
}

async function encoder (): Promise<void> {
  await record('e', 'encode', { path: CHAT, body: chat([imagePart(SMALL, key('small'))], { stream: false, max_tokens: 1 }) })
  await record('e', 'encode-again', { path: CHAT, body: chat([imagePart(SMALL, key('small'))], { stream: false, max_tokens: 1 }) })
  await record('e', 'encode-two', { path: CHAT, body: chat([imagePart(WIDE, key('wide')), imagePart(SMALL, key('small'))], { stream: false, max_tokens: 1 }) })
  await record('e', 'encode-twice', { path: CHAT, body: chat([imagePart(SMALL, key('twice')), imagePart(SMALL, key('twice'))], { stream: false, max_tokens: 1 }) })
  await record('e', 'encode-own-key', { path: CHAT, body: chat([imagePart(WIDE)], { stream: false, max_tokens: 1 }) })
  await record('e', 'encode-text', { path: CHAT, body: chat([textPart('hello')], { stream: false, max_tokens: 1 }) })
  await record('e', 'encode-stream', { path: CHAT, body: chat([imagePart(SMALL, key('small'))], { stream: true, max_tokens: 1 }) })
  await record('e', 'encode-kwargs', { path: CHAT, body: chat([imagePart(SMALL, key('kwargs'))], { stream: false, max_tokens: 1, mm_processor_kwargs: { max_pixels: 6272 } }) })
  await record('e', 'bad-picture', { path: CHAT, body: chat([imagePart('data:image/png;base64,AAAA', key('bad'))], { stream: false, max_tokens: 1 }) })
  await record('e', 'unreachable-picture', { path: CHAT, body: chat([imagePart('http://127.0.0.1:9/x.png', key('far'))], { stream: false, max_tokens: 1 }), watchMs: 1000 })
  await record('e', 'cache-miss', { path: CHAT, body: chat([imagePart(null, key('never'))], { stream: false, max_tokens: 1 }) })
}

async function consumer (): Promise<void> {
  const handle = { [key('small')]: { item_indices: [0], metadata: { image_grid_thw: [1, 4, 4] } } }
  const rewritten = chat([embedsPart(key('small'), [1, 4, 4]), textPart('what is it')], { ...ask, ec_transfer_params: handle })
  await record('pd', 'raw', { path: CHAT, body: chat([imagePart(SMALL, key('small')), textPart('what is it')], ask) })
  await record('pd', 'rewritten', { path: CHAT, body: rewritten })
  await record('pd', 'rewritten-stream', { path: CHAT, body: { ...rewritten, stream: true, stream_options: { include_usage: true } } })
  await record('pd', 'mixed', { path: CHAT, body: chat([embedsPart(key('small'), [1, 4, 4]), imagePart(WIDE, key('wide'))], ask) })
  await record('pd', 'unknown-metadata', { path: CHAT, body: chat([{ type: 'image_embeds', image_embeds: { x: [1, 4, 4] }, uuid: key('small') }], ask) })
  await record('plain', 'embeds-refused', { path: CHAT, body: chat([embedsPart(key('small'), [1, 4, 4])], ask) })
}

async function split (): Promise<void> {
  const body = chat([imagePart(SMALL, key('small')), textPart('what is it')], { ...ask, max_tokens: 1, stream: false, kv_transfer_params: PREFILL })
  const prefilled = await record('p', 'prefill', { path: CHAT, body })
  if (prefilled === undefined) return
  const handle = jsonOf(prefilled).kv_transfer_params as object
  const go = (more: object, kv: object): object => chat([imagePart(SMALL, key('small')), textPart('what is it')], { ...ask, ...more, kv_transfer_params: kv })
  await record('d', 'decode', { path: CHAT, body: go({}, handle) })
  await record('d', 'unknown-engine', { path: CHAT, body: go({}, { ...handle, remote_engine_id: '00000000-0000-0000-0000-000000000000' }), watchMs: 1000 })
  const text = await record('p', 'prefill-text', { path: CHAT, body: chat([textPart('tell me more')], { ...ask, max_tokens: 1, stream: false, kv_transfer_params: PREFILL }) })
  await record('d', 'decode-stream', { path: CHAT, body: chat([textPart('tell me more')], { ...ask, stream: true, kv_transfer_params: jsonOf(text!).kv_transfer_params }) })
  await record('d', 'unknown-engine-stream', { path: CHAT, body: go({ stream: true }, { ...handle, remote_engine_id: '00000000-0000-0000-0000-000000000000' }), watchMs: 1000 })
}

/** An embedding that does not exist: 500, then the process ends. */
async function deadly (): Promise<void> {
  const body = chat([embedsPart(key('missing'), [1, 4, 4]), textPart('what is it')], { ...ask, ec_transfer_params: {} })
  await record('pd', 'idle', { path: '/health', watchMs: 7000 })
  await record('pd', 'deadly', { path: CHAT, body, watchMs: 100 })
  await record('p', 'deadly-stream', { path: CHAT, body: { ...body, stream: true }, watchMs: 3000 })
  const states: string[] = []
  for (let i = 0; i < 100 && urls.has('pd') && states.at(-1) !== 'refused'; i++) {
    const state = await exchange(urls.get('pd')!, { path: '/health' }).then(seen => String(statusOf(seen)), () => 'refused')
    if (state !== states.at(-1)) states.push(state)
    if (state === '503') await record('pd', 'health-dead', { path: '/health' }).catch(() => {})
    await new Promise(resolve => setTimeout(resolve, 50))
  }
  process.stdout.write(`pd after death: ${states.join(', ')}\n`)
}

for (const server of urls.keys()) await common(server)
for (const server of ['plain', 'pd']) await answers(server)
await encoder()
await consumer()
await split()
await deadly()
for (const [server, exchanges] of Object.entries(seen)) await writeFile(join(out, `${server}.json`), JSON.stringify(exchanges, null, 1) + '\n')
