/** `serve --workers 2`: two processes under one port that are one gateway, through real HTTP. */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { request as httpRequest } from 'node:http'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { runCommand, startCli, type CliServer } from '../helper/cli.ts'
import { pictureUrl, post } from '../helper/fake-gateway.ts'
import { metric } from '../helper/metrics.ts'
import { CHUNK, COMPLETION, json, modelServer, well, type ModelServer, type Script } from '../helper/model-server.ts'
import { until } from '../helper/until.ts'

const CHAT = '/v1/chat/completions'
const TEXT = { model: 'm', messages: [{ role: 'user', content: 'Hello' }] }
const PICTURE = { model: 'm', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: pictureUrl(1) } }] }] }

/** Answers take some time, so that what is done to the gateway comes in the middle of them, and clients leave it the processor. */
const slowly: Script = (request, response, body, server) => {
  if (body.stream === true) response.writeHead(200, { 'content-type': 'text/event-stream' }).write(CHUNK)
  setTimeout(() => {
    if (body.stream === true) response.end(`${CHUNK}data: [DONE]\n\n`)
    else well(request, response, body, server)
  }, 50)
}

/** Requests that wait until they are let go. */
function holding (): { readonly script: Script, readonly held: () => number, readonly letGo: () => void } {
  const waiting: Array<() => void> = []
  return { script: (...call) => { waiting.push(() => { well(...call) }) }, held: () => waiting.length, letGo: () => { for (const go of waiting.splice(0)) go() } }
}

async function serve (t: Test, config: object, workers = 2): Promise<CliServer & { readonly write: (config: object) => void, readonly pids: () => Set<number> }> {
  const file = join(t.testdir({ 'epd.json': JSON.stringify(config) }), 'epd.json')
  const gateway = await startCli(t, ['serve', '--config', file, '--port', '0', '--workers', String(workers)])
  // The access log says which process has served.
  const pids = (): Set<number> => new Set([...gateway.stderr().matchAll(/"pid":(\d+)[^\n]*"msg":"request"/g)].map(found => Number(found[1])))
  return { ...gateway, write: config => { writeFileSync(file, JSON.stringify(config)) }, pids }
}

const nodesOf = (...servers: readonly ModelServer[]): object[] => servers.map(({ url }) => ({ url, adapter: 'openai' }))

interface Answer { readonly status: number, readonly text: string, readonly headers: Record<string, string | string[] | undefined> }

/** On a connection of its own: those of one after the other go to workers in turn. */
async function ask (url: string, body?: object, headers: Record<string, string> = {}): Promise<Answer> {
  const request = httpRequest(url, { agent: false, method: body === undefined ? 'GET' : 'POST', headers: { ...(body === undefined ? {} : { 'content-type': 'application/json' }), ...headers } })
  request.end(body === undefined ? undefined : JSON.stringify(body))
  const [response] = await once(request, 'response')
  const chunks: Buffer[] = []
  for await (const chunk of response) chunks.push(chunk as Buffer)
  return { status: response.statusCode, text: String(Buffer.concat(chunks)), headers: response.headers }
}

const jsonOf = async (url: string, body?: object): Promise<any> => JSON.parse((await ask(url, body)).text)

/** Clients that ask until they are stopped, and what they have seen. */
function load (t: Test, url: string, clients = 8): { readonly seen: Map<string, number>, readonly stop: () => Promise<void> } {
  const seen = new Map<string, number>()
  const ending = new AbortController()
  t.teardown(() => { ending.abort() })
  const all = Array.from({ length: clients }, async (_, i) => {
    while (!ending.signal.aborted) {
      const stream = i % 2 === 0
      const answer = await post(url + CHAT, { ...TEXT, stream }, { signal: AbortSignal.timeout(30_000) }).catch((err: unknown) => new Response(String(err), { status: 599 }))
      const text = await answer.text().catch(String)
      const whole = answer.status === 200 && (stream ? text.endsWith('data: [DONE]\n\n') && !text.includes('error') : text.includes('Hello'))
      const what = whole ? 'whole' : `${answer.status} ${text.slice(0, 200)}`
      seen.set(what, (seen.get(what) ?? 0) + 1)
    }
  })
  return { seen, stop: async () => { ending.abort(); await Promise.all(all) } }
}

/** Most tests share one gateway: three processes take their time to start. */
const { script: hold, held: heldByAll, letGo: letAllGo } = holding()
const shared = await modelServer(t, (...call) => { if (call[2].hold === true) hold(...call); else slowly(...call) })
const CONFIG = { nodes: nodesOf(shared), admission: { visionTokens: 10 }, timeouts: { grace: 30_000 } }
const gateway = await serve(t, CONFIG)
const { url } = gateway

t.test('both serve, and operators see one gateway, whichever takes the connection', async t => {
  const two = await modelServer(t, well)
  for (let i = 0; i < 6; i++) t.equal((await ask(url + CHAT, TEXT)).status, 200)
  await until(() => gateway.pids().size === 2, 'both have served')

  const texts = [await ask(`${url}/metrics`), await ask(`${url}/metrics`)].map(({ text }) => text)
  // What the process says of itself changes.
  const own = (text: string): string[] => text.split('\n').filter(line => /^(epd|gen_ai)_/.test(line))
  t.same(own(texts[0]!), own(texts[1]!))
  t.equal(metric(texts[0]!, 'epd_requests_total', { epd_topology: 'pd', epd_outcome: 'ok' }), 6)
  t.equal(metric(texts[0]!, 'gen_ai_client_operation_duration_seconds_count'), 6)
  t.match(await ask(`${url}/metrics`, undefined, { accept: 'application/openmetrics-text' }), { text: /# \{trace_id=/ })
  t.equal(metric(texts[0]!, 'epd_stage_duration_seconds_count', { epd_stage: 'decode', epd_outcome: 'ok' }), 6)
  t.equal(metric(texts[0]!, 'epd_node_up', { epd_node: shared.url }), 1)

  const traces = [await jsonOf(`${url}/epd/traces`), await jsonOf(`${url}/epd/traces`)]
  t.equal(traces[0].traces.length, 6)
  t.same(traces[0], traces[1])
  t.match(await jsonOf(`${url}/epd/traces/${traces[0].traces[0].traceId}`), { spans: [{}] })
  t.match((await ask(`${url}/epd/`)).text, '<!doctype html>')

  await jsonOf(`${url}/nodes/add`, { url: two.url, status: { role: 1, models: ['other'] } })
  await until(async () => (await jsonOf(`${url}/nodes/status`))[two.url]?.health === 'healthy', 'the new node is known')
  const models = async (): Promise<string[]> => (await jsonOf(`${url}/v1/models`)).data.map(({ id }: { id: string }) => id).sort()
  await until(async () => String([await models(), await models()]) === 'm,other,m,other', 'both workers use it')
  t.match(await jsonOf(`${url}/nodes/drain`, { url: two.url }), { health: 'draining', unfinished: 0 })
  await until(async () => String([await models(), await models()]) === 'm,m', 'both have it drained')
  t.equal((await ask(`${url}/nodes/status`, undefined, { 'x-forwarded-for': '8.8.8.8' })).status, 403, 'the guards see the client')
  t.equal((await ask(`${url}/nodes/status`, undefined, { 'x-epd-client-address': '127.0.0.1', 'x-forwarded-for': '8.8.8.8' })).status, 403)
  // The answer comes before the body has been read, or with its last byte.
  for (let n = 0; n < 10; n++) {
    t.equal((await ask(`${url}/epd/otlp/v1/traces`, { spans: 'x'.repeat(100_000) }, { authorization: 'Bearer of-another-time' })).status, 401, 'a refusal comes through')
    t.equal((await fetch(`${url}/nodes/add`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{' })).status, 400)
  }
  await jsonOf(`${url}/nodes/remove`, { url: two.url })
})

t.test('limits count over all workers', async t => {
  const { script, held, letGo } = holding()
  const key = (name: string, bounds: object): object => ({ name, hash: `sha256:${createHash('sha256').update(name).digest('hex')}`, ...bounds })
  const { url, pids } = await serve(t, {
    nodes: nodesOf(await modelServer(t, (...call) => { if (call[2].hold === true) script(...call); else well(...call) })),
    admission: { visionTokens: 10, queue: 0, retryAfter: 7 },
    keys: [key('often', { requests: 5 }), key('one', { concurrency: 1 }), key('free', {})]
  })
  const as = async (name: string, body: object): Promise<Answer> => await ask(url + CHAT, body, { authorization: `Bearer ${name}` })
  const often: Answer[] = []
  for (let i = 0; i < 8; i++) often.push(await as('often', TEXT))
  t.same(often.map(({ status }) => status), [200, 200, 200, 200, 200, 429, 429, 429], 'rates')
  t.same(often.map(({ headers }) => headers['x-ratelimit-remaining-requests']).slice(0, 6), ['4', '3', '2', '1', '0', '0'])
  t.equal(pids().size, 2)

  const busy = as('one', { ...TEXT, hold: true })
  await until(() => held() === 1, 'it is in flight')
  t.same([(await as('one', TEXT)).status, (await as('one', TEXT)).status], [429, 429], 'concurrency')
  letGo()
  t.equal((await busy).status, 200)
  await until(async () => (await as('one', TEXT)).status === 200, 'the next one may come')

  const picture = as('free', { ...PICTURE, hold: true })
  await until(() => held() === 1, 'the picture is in flight')
  t.match(await as('free', PICTURE), { status: 429, headers: { 'retry-after': '7' } }, 'admission')
  t.match(await as('free', PICTURE), { status: 429 })
  t.equal(metric((await ask(`${url}/metrics`)).text, 'epd_admission_refused_total', { epd_reason: 'queue_full' }), 2)
  t.equal(metric((await ask(`${url}/metrics`)).text, 'epd_key_requests_total', { epd_key: 'often', epd_outcome: 'refused' }), 3)
  letGo()
  t.equal((await picture).status, 200)
  await until(async () => (await as('free', PICTURE)).status === 200, 'the next picture may come')
})

t.test('a worker that is killed under load loses what it had in flight; another one takes its place', async t => {
  // Each worker has one request in flight, and one holds the right to see pictures.
  const hanging = [TEXT, { ...PICTURE }].map(async body => await ask(url + CHAT, { ...body, hold: true }).catch(() => undefined))
  await until(() => heldByAll() === 2, 'both are in flight')
  const clients = 4
  const { seen, stop } = load(t, url, clients)
  await until(() => gateway.pids().size === 2 && (seen.get('whole') ?? 0) > 20, 'both serve')
  const before = gateway.pids()
  const [pid] = before
  process.kill(pid!, 'SIGKILL')
  // Connections that are open stay with the worker that they have.
  await until(async () => {
    await ask(url + CHAT, TEXT).catch(() => {})
    return [...gateway.pids()].some(pid => !before.has(pid))
  }, 'a new worker serves', 60_000, 20)
  await stop()
  letAllGo()
  const ends = await Promise.all(hanging)
  t.equal(ends.filter(end => end === undefined).length, 1, 'one of the two was in flight at it')
  const lost = [...seen].filter(([what]) => what !== 'whole').reduce((sum, [, count]) => sum + count, 0)
  t.ok(lost <= clients, `at most what was in flight is lost: ${lost}`)
  t.equal((await ask(url + CHAT, PICTURE)).status, 200, 'what the dead one held is free')
  await until(async () => Object.values(await jsonOf(`${url}/nodes/status`)).every(status => (status as { unfinished: number }).unfinished === 0), 'nothing is counted as in flight')
  const served = seen.get('whole')!
  const counted = metric((await ask(`${url}/metrics`)).text, 'epd_requests_total', { epd_outcome: 'ok' })!
  // What it did in its last milliseconds it had no time to tell.
  t.ok(counted >= served - 5 * clients, `counts outlive their workers: ${counted} of ${served}`)
})

t.test('reloads reach all workers, and lose no request', async t => {
  const two = await modelServer(t, slowly)
  const config = (i: number): object => ({ ...CONFIG, nodes: nodesOf(...(i % 2 === 0 ? [shared] : [shared, two])), apiKeys: i === 9 ? ['new'] : [] })
  const { seen, stop } = load(t, url)
  for (let i = 1; i < 9; i++) {
    gateway.write(config(i))
    if (i % 2 === 0) gateway.child.kill('SIGHUP')
    else t.match(await ask(`${url}/epd/reload`, {}), { status: 200 })
    await until(async () => Object.keys(await jsonOf(`${url}/nodes/status`)).length === 1 + i % 2, 'it is applied', 60_000, 20)
  }
  await stop()
  t.same([...seen.keys()], ['whole'])
  gateway.write(config(9))
  t.match(JSON.parse((await ask(`${url}/epd/reload`, {})).text), { changed: ['apiKeys'] })
  t.same([(await ask(url + CHAT, TEXT)).status, (await ask(url + CHAT, TEXT)).status], [401, 401], 'at both')
  gateway.write({ apiKeys: 5 })
  t.match(await ask(`${url}/epd/reload`, {}), { status: 400, text: 'apiKeys' })
  gateway.write(CONFIG)
  t.match(await ask(`${url}/epd/reload`, {}), { status: 200 })
})

t.test('the page and /nodes/status count what is in flight at all workers, who end it on SIGTERM', async t => {
  const answers = Array.from({ length: 4 }, async () => await ask(url + CHAT, { ...TEXT, hold: true }))
  await until(() => heldByAll() === 4, 'the requests are there')
  const feed = (await fetch(`${url}/epd/feed`)).body!.pipeThrough(new TextDecoderStream()).getReader()
  let text = ''
  while (!text.includes('"inFlight":4')) text += (await feed.read()).value
  t.match(text, '"requests":4', 'also at the node')
  t.match(Object.values(await jsonOf(`${url}/nodes/status`)), [{ unfinished: 4 }])
  const ended = gateway.stop()
  // The page's feed does not hold the end up.
  while ((await feed.read().catch(() => ({ done: true }))).done !== true);
  letAllGo()
  t.same((await Promise.all(answers)).map(({ status }) => status), [200, 200, 200, 200])
  t.equal(await ended, 0)
})

t.test('what several workers can\'t do is refused at the start, and by --check', async t => {
  for (const workers of ['65', 'many']) t.match(await runCommand(['serve', '--workers', workers, '--check']), { code: 2, stderr: `--workers must be a whole number from 1 to 64, not '${workers}'` })
  const blocked = await modelServer(t, (_request, response) => { json(response, 200, COMPLETION) })
  const taken = await runCommand(['serve', '--config', join(t.testdir({ 'epd.json': '{ "embedded": false }' }), 'epd.json'), '--port', new URL(blocked.url).port, '--workers', '2'])
  t.match(taken, { code: 1, stderr: /EADDRINUSE/ }, 'a port that is taken ends all')
})
