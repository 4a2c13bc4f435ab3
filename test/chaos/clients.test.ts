/** Clients that leave, that come in crowds, that send bad pictures; and a gateway that gets SIGTERM. */
import { createServer } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { dataUrl } from '../helper/pictures.ts'
import { pngHeader } from '../helper/png.ts'
import { drawScene } from '../helper/scenes.ts'
import { Engine, gate, GatewayProcess, isError, openFiles, quiet, settle, type Question, until } from './house.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const ROUNDS = FULL ? 50 : 2
/** The promise is 100 ms; a busy machine adds to it. What is not given back stays for the minute of a lease. */
const PROMPTLY_MS = 20_000

const [gateway, tight, encoder, llm] = await Promise.all([
  GatewayProcess.start(t),
  GatewayProcess.start(t, { admission: { visionTokens: 1, queue: 2, wait: 4_000, retryAfter: 3 } }),
  Engine.start(t, 'encoder'),
  Engine.start(t, 'hybrid')
])
const engines = [encoder, llm]
await Promise.all([gateway.use(...engines), tight.use(...engines)])
const pictures = await Promise.all([1, 2].map(drawScene))
const [picture] = pictures as [string]
const long = { max_tokens: 3000, ignore_eos: true }
await gateway.ask({ pictures: [picture] })
await settle(gateway, tight, ...engines)
const filesAtStart = new Map([gateway, tight, ...engines].map(part => [part, openFiles(part.pid)]))

t.afterEach(() => { for (const { node } of engines) node.heal() })

/** A client leaves as soon as `there`; everything must be given back promptly. The time that asking all nodes takes is subtracted. */
async function leaving (t: Test, through: GatewayProcess, question: () => Question, there: () => boolean | Promise<boolean>): Promise<void> {
  const times: number[] = []
  for (let round = 0; round < ROUNDS; round++) {
    await encoder.clearCache()
    const asking = await quiet(t, through, ...engines)
    const stop = new AbortController()
    let early: string | undefined
    const asked = through.stream({ ...question(), signal: stop.signal }).then(async stream => {
      const whole = await stream.ended
      early = `${stream.status} ${JSON.stringify(stream.last)}`
      return whole
    }, () => false)
    await until(async () => {
      if (early !== undefined) throw new Error(`the answer came before its client could leave: ${early}`)
      return await there()
    }, 'the request is where it shall be')
    stop.abort()
    t.equal(await asked, false)
    times.push(Math.round(await quiet(t, through, ...engines) - asking))
    for (const { node } of engines) node.fail({ kind: 'none' })
  }
  t.ok(Math.max(...times) < PROMPTLY_MS, `free after ${times.join(', ')} ms`)
}

const count = async (status: string): Promise<boolean> => (await encoder.metrics()).split('\n').some(line => line.startsWith('epd_sequences{') && line.includes(`"${status}"`) && !line.endsWith(' 0'))

await t.test('a client that leaves while its pictures are encoded (a batch that runs is held to its end)', async t => {
  let seed = 1_000
  const many: string[] = []
  for (let i = 0; i < 24; i++) many.push(await drawScene(seed++))
  await leaving(t, gateway, () => ({ pictures: many }), async () => await count('running') || await count('preprocessing'))
})

await t.test('a client that leaves when the encoder has answered, but the answer is unread', async t => {
  await leaving(t, gateway, () => { encoder.node.fail({ kind: 'hold' }); return { pictures } }, () => encoder.node.answered > 0)
})

await t.test('a client that leaves before the language model has answered', async t => {
  await leaving(t, gateway, () => { llm.node.fail({ kind: 'hang' }); return { pictures } }, () => llm.node.hits > 0)
  await leaving(t, gateway, () => { llm.node.fail({ kind: 'hold' }); return { pictures, more: long } }, () => llm.node.hits > 0)
})

await t.test('a client that leaves in the middle of its answer', async t => {
  await leaving(t, gateway, () => ({ pictures, more: long }), () => llm.node.answered > 0)
})

await t.test('overload: a bounded queue, then 429 with Retry-After; text does not wait', async t => {
  const held = gate()
  llm.node.fail({ kind: 'wait', until: held.opened }, 1)
  const inside = tight.ask({ pictures: [picture] })
  await until(() => llm.node.hits === 1, 'one is inside')
  const stop = new AbortController()
  const left = tight.ask({ pictures: [picture], signal: stop.signal }).catch(() => 'left')
  const patient = [tight.ask({ pictures: [picture] })]
  await until(async () => (await tight.metrics()).split('\n').some(line => /^epd_\w*(waiting|queue)\w*(\{.*\})? 2$/.test(line)), 'two wait')
  const late = await tight.ask({ pictures: [picture] })
  isError(t, late, { status: 429, code: 'rate_limit_exceeded', again: true })
  t.equal(late.headers.get('retry-after'), '3')
  stop.abort()
  t.equal(await left, 'left')
  t.equal((await tight.ask()).status, 200, 'text is answered meanwhile')
  patient.push(tight.ask({ pictures: [picture] }))
  for (const answer of await Promise.all(patient)) isError(t, answer, { status: 429, code: 'rate_limit_exceeded', again: true })
  held.open()
  t.equal((await inside).status, 200)
  t.equal((await tight.ask({ pictures: [picture] })).status, 200)
  await quiet(t, gateway, tight, ...engines)
})

await t.test('bad pictures are a 400 that names the part and reveals nothing else', async t => {
  let dialled = 0
  const inside = createServer((_request, response) => { dialled++; response.end('secret') }).listen(0, '127.0.0.1')
  t.teardown(() => inside.close())
  await once(inside, 'listening')
  const { port } = inside.address() as AddressInfo
  const good = Buffer.from(picture.split(',')[1]!, 'base64')
  const bad: Record<string, string> = {
    bomb: dataUrl(pngHeader(50_000, 50_000)),
    truncated: dataUrl(good.subarray(0, good.length >> 1)),
    text: `data:image/png;base64,${Buffer.from('no picture at all').toString('base64')}`,
    'wrong type': `data:text/html;base64,${Buffer.from('<svg/>').toString('base64')}`,
    'no base64': 'data:image/png;base64,@@@@',
    empty: 'data:image/png;base64,',
    loopback: `http://127.0.0.1:${port}/x.png`,
    name: `http://localhost:${port}/x.png`,
    decimal: `http://2130706433:${port}/x.png`,
    ipv6: `http://[::1]:${port}/x.png`,
    metadata: 'http://169.254.169.254/latest/meta-data/',
    file: 'file:///etc/passwd',
    scheme: 'ftp://example.com/x.png',
    lease: 'epd:0123456789abcdef'
  }
  const part = (url: string): object => ({ type: 'image_url', image_url: { url } })
  for (const plan of ['e-pd', 'hybrid']) {
    await gateway.useAfresh(...(plan === 'e-pd' ? engines : [llm]))
    await Promise.all(Object.entries(bad).map(async ([name, url]) => {
      const messages = [{ role: 'system', content: 'Be brief.' }, { role: 'user', content: [part(picture)] }, { role: 'assistant', content: 'Yes?' },
        { role: 'user', content: [{ type: 'text', text: 'What is it?' }, part(pictures[1]!), part(url)] }]
      const answer = await gateway.ask({ more: { messages, stream: name.length % 2 === 0 } })
      isError(t, answer, { status: 400, code: String, param: /^messages\[3\]\.content\[2\](\.image_url(\.url)?)?$/ })
      t.notMatch(JSON.stringify(answer.body), /127\.0\.0\.1|localhost|secret|node_modules|\.js|root:/, `${plan}, ${name}: ${answer.body.error?.message}`)
    }))
    const status = await gateway.status()
    for (const { id } of plan === 'e-pd' ? engines : [llm]) t.match(status[id]?.breakers, { encode: 'closed', decode: 'closed' })
    await quiet(t, gateway, ...engines)
  }
  t.equal(dialled, 0, 'no private address was dialled')
  await gateway.use(...engines)
  t.equal((await gateway.ask({ pictures: [picture] })).status, 200)
})

await t.test('a gateway that gets SIGTERM lets streams finish, takes no more, and exits with 0', async t => {
  const ending = await GatewayProcess.start(t, { timeouts: { grace: 60_000 } })
  await ending.use(...engines)
  const stream = await ending.stream({ pictures, more: { max_tokens: 150, ignore_eos: true } })
  await until(() => stream.events.length > 0, 'events have come')
  const exit = ending.server.stop('SIGTERM')
  await until(async () => {
    const late = await ending.ask({ pictures: [picture] }).catch(() => 'refused' as const)
    if (late !== 'refused' && late.status === 200) return false
    if (late !== 'refused') isError(t, late, { status: 503, code: 'gateway_closing', again: true })
    return true
  }, 'new requests are refused')
  t.equal(await stream.ended, true)
  t.equal(stream.last, '[DONE]')
  t.equal(await exit, 0)
  await quiet(t, ...engines)
})

await t.test('what does not finish within the grace time is ended, in the engines too', async t => {
  const ending = await GatewayProcess.start(t, { timeouts: { grace: 300 } })
  await ending.use(...engines)
  const stream = await ending.stream({ pictures, more: long })
  await until(() => stream.events.length > 0, 'events have come')
  llm.node.fail({ kind: 'hang' })
  const waiting = ending.ask({ pictures: [picture] })
  await until(() => llm.node.hits === 1, 'another one waits')
  const exit = ending.server.stop('SIGTERM')
  isError(t, await waiting, { status: 503, code: 'gateway_closing', again: true })
  t.equal(await stream.ended, true)
  t.match(stream.last, { error: { type: String, message: String } })
  t.equal(await exit, 0)
  await quiet(t, ...engines)
})

await t.test('nothing is left of all this', async t => {
  await quiet(t, gateway, tight, ...engines)
  t.same((await Promise.all(engines.map(async engine => await engine.remains()))).filter(Boolean), [])
  for (const [part, before] of filesAtStart) {
    if (before === undefined) continue
    await until(() => openFiles(part.pid)! <= before + 6, 'files are closed').catch(() => { t.fail(`${part instanceof Engine ? part.role : 'gateway'} has ${openFiles(part.pid)} files open, had ${before}`) })
  }
})
