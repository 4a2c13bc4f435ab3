/** The wire between encoder and language model: damage, breaks, silence; leases that no engine uses; deaths in mid-pull. */
import t from 'tap'
import { drawScene } from '../helper/scenes.ts'
import { Engine, gate, GatewayProcess, isError, openFiles, quiet, settle, type Answer, until } from './house.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const ROUNDS = FULL ? 30 : 1
const LEASE_MS = 1_000
/** Of an engine that waits for blocks. */
const PULL_TIMEOUT_MS = 30_000
/** Bytes of features into a pull at which the fault strikes. */
const AT = 9_000

/** Most faults are to strike the pull of a request; with overlap it would find the features there. */
const [gateway, ahead, e1, e2, p1, p2] = await Promise.all([
  GatewayProcess.start(t, { overlap: false, timeouts: { firstByte: 30_000, answer: 30_000 } }),
  GatewayProcess.start(t, { timeouts: { firstByte: 30_000, answer: 30_000 } }),
  Engine.start(t, 'encoder', { flakyWire: true, flags: ['--lease-seconds', String(LEASE_MS / 1_000)] }),
  Engine.start(t, 'encoder'),
  Engine.start(t, 'hybrid', { flags: ['--no-vision'] }),
  Engine.start(t, 'hybrid', { flags: ['--no-vision'] })
])
const engines = [e1, e2, p1, p2]
await gateway.use(e1, p1)
let seed = 1
/** Pictures that no engine has seen: what an engine has already is not pulled. */
const fresh = async (count = 3): Promise<string[]> => await Promise.all(Array.from({ length: count }, async () => await drawScene(seed++)))
await gateway.ask({ pictures: await fresh() })
await settle(gateway, ...engines)
const filesAtStart = new Map([gateway, ...engines].map(part => [part, openFiles(part.pid)]))

t.afterEach(() => {
  e1.node.wire.arm({ kind: 'none' })
  for (const { node } of engines) node.heal()
})

/** Asks while something is wrong with the wire. */
async function askOver (fault: 'flip' | 'cut' | 'stall'): Promise<Answer> {
  const pictures = await fresh()
  e1.node.wire.arm({ kind: fault, at: AT })
  return await gateway.ask({ pictures })
}

await t.test('damaged features are noticed, and the request starts again', async t => {
  await gateway.useAfresh(e1, p1)
  for (let round = 0; round < ROUNDS; round++) {
    p1.node.fail({ kind: 'none' })
    const answer = await askOver('flip')
    t.equal(answer.status, 200, JSON.stringify(answer.body))
    t.equal(p1.node.seen, 2)
    await quiet(t, gateway, ...engines)
  }
})

await t.test('a link that is reset in mid-pull is made again, and the request with it', async t => {
  await gateway.useAfresh(e1, p1)
  for (let round = 0; round < ROUNDS; round++) {
    const answer = await askOver('cut')
    t.equal(answer.status, 200, JSON.stringify(answer.body))
    await gateway.linked(e1, p1)
    await quiet(t, gateway, ...engines)
  }
})

await t.test('a link that falls silent in mid-pull: the pictures go over another one, or the client gets an error', async t => {
  await gateway.useAfresh(e1, e2, p1)
  const over: string[] = []
  while (!over.includes(e1.id)) {
    const answer = await askOver('stall')
    t.equal(answer.status, 200, JSON.stringify(answer.body))
    over.push(...answer.headers.get('x-epd-encoders')?.split(',') ?? [])
    if (e1.node.wire.passed > AT) break
  }
  await quiet(t, gateway, ...engines)
  e1.node.wire.arm({ kind: 'none' })
  t.equal((await gateway.ask({ pictures: await fresh() })).status, 200)
})

await t.test('a language model killed with -9 in mid-pull: another one pulls anew', async t => {
  await gateway.useAfresh(e1, p1, p2)
  const pictures = await fresh()
  e1.node.wire.arm({ kind: 'stall', at: AT })
  const asked = gateway.ask({ pictures })
  await until(() => e1.node.wire.passed > AT, 'the pull is on')
  t.equal(p1.node.seen, 1)
  e1.node.wire.arm({ kind: 'none' })
  await p1.stop('SIGKILL')
  t.equal((await asked).status, 200)
  t.equal(p2.node.seen, 1)
  await quiet(t, gateway, ...engines)
  await p1.startAgain()
  await gateway.linked(e1, p1, p2)
})

await t.test('an encoder killed with -9 in mid-pull: another one encodes', async t => {
  await gateway.useAfresh(e1, e2, p1)
  let pictures: string[] = []
  // At least one of these is for e1.
  do pictures = await fresh(6)
  while (!(await gateway.ask({ pictures })).headers.get('x-epd-encoders')?.includes(e1.id))
  await p1.clearCache()
  // The features of the smallest picture alone are more than that.
  e1.node.wire.arm({ kind: 'stall', at: 2_000 })
  const asked = gateway.ask({ pictures })
  await until(() => e1.node.wire.passed > 2_000, 'the pull is on')
  await e1.stop('SIGKILL')
  // A wire that is silent would hide the death.
  await e1.node.wire.close()
  const answer = await asked
  t.equal(answer.status, 200, JSON.stringify(answer.body))
  t.notOk(answer.headers.get('x-epd-encoders')?.includes(e1.id))
  await quiet(t, gateway, ...engines)
  await e1.startAgain()
  await gateway.linked(e1, e2, p1)
})

await t.test('a client that leaves in mid-pull', async t => {
  await gateway.useAfresh(e1, p1)
  for (let round = 0; round < (FULL ? 5 : 1); round++) {
    const stop = new AbortController()
    const pictures = await fresh()
    e1.node.wire.arm({ kind: 'stall', at: AT })
    const asked = gateway.ask({ pictures, signal: stop.signal }).catch(() => 'left')
    await until(() => e1.node.wire.passed > AT, 'the pull is on')
    stop.abort()
    t.equal(await asked, 'left')
    const ms = await quiet(t, gateway, p1)
    t.ok(ms < PULL_TIMEOUT_MS, `the language model is free after ${Math.round(ms)} ms`)
    e1.node.wire.arm({ kind: 'none' })
    await quiet(t, e1)
    // The silent connection is beyond repair; the engines notice by their heartbeats and dial again.
    t.equal((await gateway.ask({ pictures: await fresh(1) })).status, 200, 'who comes next is answered')
  }
})

await t.test('a lease that no engine uses expires, and a request that comes too late starts again', async t => {
  await gateway.useAfresh(e1, p1)
  const held = gate()
  p1.node.fail({ kind: 'wait', until: held.opened }, 1)
  const asked = gateway.ask({ pictures: await fresh() })
  await until(() => p1.node.hits === 1, 'the features are ready')
  t.equal(await e1.gauge('epd_leases_open'), 3)
  await until(async () => await e1.gauge('epd_leases_open') === 0, 'the leases have expired')
  held.open()
  const answer = await asked
  t.equal(answer.status, 200, JSON.stringify(answer.body))
  t.equal(p1.node.seen, 2)
  await quiet(t, gateway, ...engines)
})

await t.test('faults that strike what is pulled ahead cost the request nothing but time', async t => {
  await ahead.useAfresh(e1, p1)
  for (const fault of ['flip', 'cut'] as const) {
    const pictures = await fresh()
    e1.node.wire.arm({ kind: fault, at: AT })
    const answer = await ahead.ask({ pictures })
    t.equal(answer.status, 200, `${fault}: ${JSON.stringify(answer.body)}`)
    await ahead.linked(e1, p1)
    await quiet(t, ahead, ...engines)
  }
  // Until the engines notice the silence takes seconds.
  if (!FULL) return
  const stop = new AbortController()
  const pictures = await fresh()
  e1.node.wire.arm({ kind: 'stall', at: AT })
  const asked = ahead.ask({ pictures, signal: stop.signal }).catch(() => 'left')
  await until(() => e1.node.wire.passed > AT, 'the pull is on')
  stop.abort()
  t.equal(await asked, 'left')
  e1.node.wire.arm({ kind: 'none' })
  await quiet(t, ahead, ...engines)
  t.equal((await ahead.ask({ pictures: await fresh(1) })).status, 200, 'who comes next is answered')
})

await t.test('a language model killed with -9 while it pulls ahead: another one pulls anew', async t => {
  await ahead.useAfresh(e1, p1, p2)
  const pictures = await fresh()
  e1.node.wire.arm({ kind: 'stall', at: AT })
  const asked = ahead.ask({ pictures })
  await until(() => e1.node.wire.passed > AT, 'the pull is on')
  e1.node.wire.arm({ kind: 'none' })
  await p1.stop('SIGKILL')
  t.equal((await asked).status, 200)
  await quiet(t, ahead, e1, p2)
  await p1.startAgain()
  await ahead.linked(e1, p1, p2)
  await quiet(t, ahead, ...engines)
})

await t.test('features that are lost in every attempt are a 503 with Retry-After', async t => {
  await gateway.useAfresh(e1, p1)
  const gone = { error: { message: 'gone', type: 'invalid_request_error', code: 'features_gone', param: null } }
  p1.node.fail({ kind: 'answer', status: 410, body: gone })
  isError(t, await gateway.ask({ pictures: await fresh() }), { status: 503, code: 'features_gone', again: true })
  t.equal(p1.node.seen, 3)
  await quiet(t, gateway, ...engines)
})

await t.test('a gateway killed with -9 leaves engines that come to rest by themselves', async t => {
  const doomed = await GatewayProcess.start(t)
  await doomed.use(e1, p1)
  const stream = await doomed.stream({ pictures: await fresh(), more: { max_tokens: 3_000, ignore_eos: true } })
  await until(() => stream.events.length > 0, 'one request is answered')
  p1.node.fail({ kind: 'hang' })
  const asked = doomed.ask({ pictures: await fresh() }).catch(() => 'broken')
  await until(() => p1.node.hits === 1, 'another one has been encoded')
  await doomed.server.stop('SIGKILL')
  t.equal(await asked, 'broken')
  t.equal(await stream.ended, false)
  await quiet(t, e1, p1)
})

await t.test('nothing is left of all this', async t => {
  await quiet(t, gateway, ...engines)
  t.same((await Promise.all(engines.map(async engine => await engine.remains()))).filter(Boolean), [])
  for (const [part, before] of filesAtStart) {
    if (before === undefined) continue
    await until(() => openFiles(part.pid)! <= before + 6, 'files are closed').catch(() => { t.fail(`${part instanceof Engine ? part.role : 'gateway'} has ${openFiles(part.pid)} files open, had ${before}`) })
  }
})
