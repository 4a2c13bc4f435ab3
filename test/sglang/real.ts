/**
 * `npm run test:sglang`: the gateway before real SGLang servers, three encoders and a language server, and the same
 * language server with stock wiring beside it. Not in CI, installs nothing. EPD_SGLANG is the command that starts a server,
 * up to its role; for a machine without a GPU it has `--device cpu` and what goes with it.
 */
import { createServer, request as send } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import epd from '../../plugin/index.ts'
import { machine, median, table, writeSection } from '../bench/report.ts'
import { freePort } from '../helper/free-port.ts'
import { dataUrl, makeScene, renderScene, seededRandom } from '../helper/pictures.ts'
import { until } from '../helper/until.ts'
import { SglangServer } from './servers.ts'

const { EPD_SGLANG: command, EPD_SGLANG_TRANSFER: transfer = 'zmq_to_scheduler', EPD_SGLANG_ENCODER_ARGS: encoderArgs = '', EPD_SGLANG_LM_ARGS: lmArgs = '' } = process.env
const VIRTUAL = 5
// Servers load models; on a CPU an answer takes seconds.
t.setTimeout(0)
const BAD = 'data:image/png;base64,AAAA'

if (command === undefined) {
  console.error(`Set EPD_SGLANG to the command that starts a server of SGLang, without role and port:
  EPD_SGLANG="python -m sglang.launch_server --model-path Qwen/Qwen2-VL-2B-Instruct" npm run test:sglang
EPD_SGLANG_TRANSFER (zmq_to_scheduler or zmq_to_tokenizer), EPD_SGLANG_ENCODER_ARGS and EPD_SGLANG_LM_ARGS add to it. SGLang: pip install sglang==0.5.23`)
  process.exit(2)
}

interface House { readonly app: FastifyInstance, readonly gateway: string, readonly virtual: readonly string[], readonly lm: SglangServer, readonly bootstrap: string, readonly encoders: SglangServer[] }

async function build (command: string): Promise<House> {
  const app = Fastify({ logger: { level: 'error' } })
  // An encode may take a minute on a machine without a GPU that does other things too.
  await app.register(epd, { embedded: false, timeouts: { encode: 100_000 } })
  const gateway = await app.listen({ host: '127.0.0.1', port: 0 })
  const virtual = Array.from({ length: VIRTUAL }, (_, i) => `${gateway}/sglang/v/${i}`)
  const common = ['--encoder-transfer-backend', transfer]
  const port = await freePort()
  const lm = await SglangServer.start(command, 'lm', ['--language-only', ...common, '--encoder-bootstrap-port', String(port), '--encoder-urls', ...virtual, lmArgs])
  // The third is spare, and takes the place of one that is killed.
  const encoders = await Promise.all([0, 1, 2].map(async i => await SglangServer.start(command, `encoder${i}`, ['--encoder-only', ...common, encoderArgs, ...(i < 2 ? ['--encoder-register-urls', gateway] : [])])))
  await Promise.all([lm, ...encoders].map(async server => await server.ready()))
  app.epd.nodes.add({ url: lm.url, adapter: 'sglang' })
  await until(() => app.epd.nodes.snapshot().nodes.filter(node => node.state === 'healthy').length === 3, 'two encoders have registered, and the language server is known', 120_000)
  return { app, gateway, virtual, lm, bootstrap: `http://127.0.0.1:${port}`, encoders }
}

/** Wires the language server: its registry takes addresses at run time. */
async function wire ({ bootstrap, virtual, encoders }: House, urls: readonly string[]): Promise<void> {
  const call = async (method: string, path: string, url?: string): Promise<Response> => await fetch(bootstrap + path, { method, ...(url === undefined ? {} : { headers: { 'content-type': 'application/json' }, body: JSON.stringify({ url }) }) })
  const { encoder_urls: old } = await (await call('GET', '/list_encoder_urls')).json() as { encoder_urls: string[] }
  // An encoder that missed its health checks is off the list, and would come back by itself.
  for (const url of new Set([...old, ...virtual, ...encoders.map(encoder => encoder.url)])) await call('DELETE', '/unregister_encoder_url', url)
  for (const url of urls) await call('POST', '/register_encoder_url', url)
}

interface Told { readonly status: number, readonly text: string | undefined, readonly code: unknown, readonly encoders: readonly string[], readonly ms: number }

async function ask (url: string, pictures: readonly string[], signal?: AbortSignal): Promise<Told> {
  const content = [...pictures.map(picture => ({ type: 'image_url', image_url: { url: picture } })), { type: 'text', text: 'What do you see?' }]
  const start = performance.now()
  try {
    const answer = await fetch(`${url}/v1/chat/completions`, {
      method: 'POST', headers: { 'content-type': 'application/json' }, signal: signal ?? AbortSignal.timeout(170_000), body: JSON.stringify({ model: await model, messages: [{ role: 'user', content }], max_tokens: 8, temperature: 0 })
    })
    const body = await answer.json() as { choices?: Array<{ message: { content: string } }>, error?: { code?: unknown } }
    return { status: answer.status, text: body.choices?.[0]?.message.content, code: body.error?.code, encoders: answer.headers.get('x-epd-encoders')?.split(',') ?? [], ms: performance.now() - start }
  } catch {
    return { status: 0, text: undefined, code: undefined, encoders: [], ms: performance.now() - start }
  }
}

const random = seededRandom(16)
async function picture (): Promise<string> {
  return dataUrl(await renderScene(makeScene(random)))
}

async function picturesOf (count: number): Promise<string[]> {
  return await Promise.all(Array.from({ length: count }, picture))
}

/** Passes calls on to an encoder and says which pictures it got. */
async function counted (t: Test, encoder: string, got: string[]): Promise<string> {
  const server = createServer((req, res) => {
    const chunks: Buffer[] = []
    req.on('data', (chunk: Buffer) => chunks.push(chunk)).on('end', () => {
      const body = Buffer.concat(chunks)
      if (req.url === '/encode') got.push(...(JSON.parse(body.toString()) as { mm_items: string[] }).mm_items)
      const up = send(encoder + req.url!, { method: req.method!, headers: req.headers }, answer => { res.writeHead(answer.statusCode!, answer.headers); answer.pipe(res) })
      up.on('error', () => { res.destroy() }).end(body)
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
}

/** Share of repeated pictures that an encoder had seen before. */
function hitRate (pictures: ReadonlyArray<readonly string[]>): number {
  let [hits, repeats] = [0, 0]
  const everywhere = new Set<string>()
  for (const got of pictures) {
    hits += got.length - new Set(got).size
    for (const one of new Set(got)) everywhere.add(one)
  }
  repeats = pictures.reduce((sum, got) => sum + got.length, 0) - everywhere.size
  return hits / repeats
}

async function lost (url: string, pictures: readonly string[], dying: SglangServer): Promise<{ lost: number, right: boolean, answers: Told[] }> {
  const expected = new Map<string, string | undefined>()
  for (const one of pictures) expected.set(one, (await ask(url, [one])).text)
  const asked = pictures.flatMap(one => [one, one]).map(async (one, i) => {
    await delay(i * 60)
    // Stopped, it takes calls and answers none: they are lost with it.
    if (i === pictures.length - 2) dying.signal('SIGSTOP')
    if (i === pictures.length + 2) dying.signal('SIGKILL')
    const answer = await ask(url, [one])
    return { ...answer, right: answer.text === expected.get(one) }
  })
  const answers = await Promise.all(asked)
  return { lost: answers.filter(answer => answer.status !== 200).length, right: answers.every(answer => answer.status !== 200 || answer.right), answers }
}

const house = await build(command)
const model = fetch(`${house.lm.url}/v1/models`).then(async answer => ((await answer.json()) as { data: Array<{ id: string }> }).data[0]!.id)
t.teardown(async () => {
  await Promise.all([house.lm, ...house.encoders].map(async server => { await server.kill() }))
  await house.app.close()
})
const { gateway, virtual, lm, encoders } = house
const [one, two, spare] = encoders as [SglangServer, SglangServer, SglangServer]
const rows: Array<[string, string | number, string | number]> = []

// The first encode of an encoder loads what it needs.
for (const urls of [[one.url, two.url], [spare.url]]) {
  await wire(house, urls)
  for (let tries = 0; tries < 10 && (await ask(lm.url, await picturesOf(urls.length))).ms > 2_000;) tries++
}

await t.test('answers with 1 to 5 pictures equal those of stock wiring', async t => {
  const requests = await Promise.all([1, 2, 3, 4, 5].map(picturesOf))
  await wire(house, [one.url, two.url])
  const stock: Told[] = []
  for (const pictures of requests) stock.push(await ask(lm.url, pictures))
  await wire(house, virtual)
  for (const [i, pictures] of requests.entries()) {
    const answer = await ask(gateway, pictures)
    t.equal(answer.status, 200, `${i + 1} pictures`)
    t.equal(answer.text, stock[i]!.text)
    t.equal(answer.encoders.length, i + 1)
    t.same((await ask(gateway, pictures)).encoders, answer.encoders, 'each goes to the same encoder again')
  }
})

await t.test('a picture is repeated', async t => {
  const pictures = await picturesOf(6)
  const repeated = Array.from({ length: 4 }, () => pictures).flat()
  const got: [string[], string[]] = [[], []]
  await wire(house, await Promise.all([one, two].map(async ({ url }, i) => await counted(t, url, got[i]!))))
  for (const one of repeated) await ask(lm.url, [one])
  await wire(house, virtual)
  const through: [string[], string[]] = [[], []]
  for (const url of repeated) through[(await ask(gateway, [url])).encoders[0] === one.url ? 0 : 1].push(url)
  t.equal(hitRate(through), 1)
  rows.push(['a repeated picture meets the encoder that had it', `${Math.round(100 * hitRate(got))} %`, `${Math.round(100 * hitRate(through))} %`])
})

await t.test('what a call costs', async t => {
  const times: [number[], number[], number[]] = [[], [], []]
  for (let round = 0; round < 4; round++) {
    const pictures = await picturesOf(5)
    await wire(house, [one.url, two.url])
    for (const one of pictures) times[0].push((await ask(lm.url, [one])).ms)
    await wire(house, virtual)
    for (const one of pictures) times[1].push((await ask(lm.url, [one])).ms)
    for (const one of pictures) times[2].push((await ask(gateway, [one])).ms)
  }
  t.ok(times.every(list => list.every(ms => ms < 30_000)))
  const [stock, encodes, whole] = times.map(median) as [number, number, number]
  rows.push(['a request with one picture, median, ms', stock.toFixed(1), whole.toFixed(1)], ['with virtual encoders, the client at the language server, ms', stock.toFixed(1), encodes.toFixed(1)])
})

await t.test('a picture that can not be read is a 400, and costs no server', async t => {
  const [good] = await picturesOf(1) as [string]
  for (const pictures of [[BAD], [good, BAD]]) t.match(await ask(gateway, pictures), { status: 400, code: 'invalid_media' })
  await delay(8_000)
  t.equal(lm.exited, false)
  t.equal((await ask(gateway, [good])).status, 200)
})

await t.test('a client that leaves, before, in and after encode, costs no server', async t => {
  for (const ms of [1, 10, 30, 60, 120]) {
    const signal = AbortSignal.timeout(ms)
    await ask(gateway, await picturesOf(2), signal)
  }
  const [frozen] = await picturesOf(1) as [string]
  one.signal('SIGSTOP')
  two.signal('SIGSTOP')
  await ask(gateway, [frozen], AbortSignal.timeout(1_500))
  one.signal('SIGCONT')
  two.signal('SIGCONT')
  await delay(8_000)
  t.equal(lm.exited, false)
  t.equal((await ask(gateway, [frozen])).status, 200)
})

await t.test('an encoder is killed while requests go on: before, in and after an encode', async t => {
  const pictures = await picturesOf(6)
  const before = await Promise.all(pictures.map(async one => await ask(gateway, [one])))
  t.ok(before.every(answer => answer.status === 200))
  const died = await lost(gateway, pictures, two)
  t.equal(died.lost, 0, 'none is lost')
  t.ok(died.right, 'every answer is right')
  t.equal(lm.exited, false)
  const after = await Promise.all(pictures.map(async one => await ask(gateway, [one])))
  t.ok(after.every((answer, i) => answer.status === 200 && answer.text === before[i]!.text), 'later ones too')
  house.app.epd.nodes.add({ url: spare.url, role: 'encoder', adapter: 'sglang' })
  await wire(house, [one.url, spare.url])
  const stock = await lost(lm.url, await picturesOf(6), spare)
  // It sleeps 5 s before it ends.
  await delay(10_000)
  rows.push(['of 12 requests, lost when an encoder is killed', String(stock.lost), String(died.lost)])
  rows.push(['the language server lives on', lm.exited ? 'no' : 'yes', 'yes'])
})

const figures = `${table(['', 'stock wiring', 'through the gateway'], rows)}\n\nSGLang's \`${transfer}\`. Measured on: ${machine()}`
console.log('\n' + figures)
if (process.argv.includes('--write')) writeSection('sglang', `## SGLang\n\n\`npm run test:sglang -- --write\`: two encoders and a language server of stock SGLang, wired directly and through the gateway.\n\n${figures}`)
