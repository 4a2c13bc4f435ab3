/** Encoders and language models that refuse, reset, hang, die, restart and flap, seen from the client. */
import t from 'tap'
import { seededRandom } from '../helper/pictures.ts'
import { drawScene } from '../helper/scenes.ts'
import { Engine, gate, Gateway, GatewayProcess, isError, openFiles, ownerOf, quiet, settle, until } from './house.ts'
import type { NodeFault } from './faulty-node.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const ROUNDS = FULL ? 10 : 1
const MIXED = FULL ? 1_000 : 24
const RESET: NodeFault = { kind: 'reset' }
const BROKEN: NodeFault = { kind: 'answer', status: 500, body: { error: { message: 'why it broke', type: 'server_error', code: null, param: null } } }
const busy = (seconds: number): NodeFault => ({ kind: 'answer', status: 503, headers: { 'retry-after': String(seconds) }, body: { error: { message: 'full', type: 'server_error', code: 'busy', param: null } } })

const timeouts = { encode: 3000, firstByte: 4000, answer: 10_000, idle: 10_000 }
const [gateway, hasty, flapping, e1, e2, p1, p2] = await Promise.all([
  // With overlap a request would find the features of an encoder that restarts, and would not start again.
  GatewayProcess.start(t, { timeouts, overlap: false }),
  Gateway.here(t, { timeouts: { encode: 1_500, firstByte: 1_500, answer: 1_500, idle: 1_500 } }),
  Gateway.here(t, { timeouts }),
  Engine.start(t, 'encoder'),
  Engine.start(t, 'encoder'),
  Engine.start(t, 'hybrid'),
  Engine.start(t, 'hybrid', { flags: ['--no-vision'] })
])
const engines = [e1, e2, p1, p2]
const pictures = await Promise.all([1, 2, 3, 4].map(drawScene))
const [picture] = pictures as [string]
const other = (encoder: Engine): Engine => encoder === e1 ? e2 : e1

await gateway.use(...engines)
const first = await gateway.ask({ pictures: [picture] })
const right = first.body.choices[0].message.content as string
/** The encoder of the picture, and the next one by hash. */
const mine = first.headers.get('x-epd-encoders') === e1.id ? e1 : e2
const next = other(mine)
await settle(gateway, ...engines)
const filesAtStart = new Map([gateway, ...engines].map(part => [part, openFiles(part.pid)]))

t.afterEach(async () => { for (const { node } of engines) node.heal() })

/** Belongs to `next`, which no test restarts: a restart would close its breaker. */
let theirs = ''

await t.test('a node that flaps is left alone after a while, and kept', async t => {
  await flapping.use(e1, e2, p1)
  for (let seed = 100; theirs === ''; seed++) {
    const url = await drawScene(seed)
    if ((await flapping.ask({ pictures: [url] })).headers.get('x-epd-encoders') === next.id) theirs = url
  }
  next.node.fail(RESET)
  for (let i = 0; i < 5; i++) t.equal((await flapping.ask({ pictures: [theirs] })).status, 200)
  t.equal((await flapping.status())[next.id]?.breakers.encode, 'open', 'five failures in a row open the breaker')
  t.equal((await flapping.status())[next.id]?.breakers.decode, 'closed', 'of this stage only')
  next.node.heal()
  const answer = await flapping.ask({ pictures: [theirs] })
  t.equal(answer.headers.get('x-epd-encoders'), mine.id)
  t.equal(next.node.seen, 0, 'it was not even asked')
  t.equal((await flapping.status())[next.id]?.health, 'healthy', 'its probes are good, and it is still there')
})

await t.test('an encoder that fails in any way loses its pictures to the next one', async t => {
  const faults: NodeFault[] = FULL ? [RESET, BROKEN, busy(1), { kind: 'cut', after: 0 }, { kind: 'hang' }, { kind: 'hold' }] : [RESET, BROKEN, { kind: 'hang' }]
  for (const fault of faults) {
    // An encode call that meets a reset is sent once more, in case a kept connection had just been closed.
    const times = fault.kind === 'reset' ? 2 : 1
    mine.node.fail(fault, times)
    const answer = await gateway.ask({ pictures: [picture, ...pictures] })
    t.equal(answer.status, 200, fault.kind)
    t.equal(answer.headers.get('x-epd-plan'), 'e-pd')
    t.equal(answer.headers.get('x-epd-encoders')?.split(',')[0], next.id)
    t.equal(mine.node.hits, times)
    await quiet(t, gateway, ...engines)
  }
})

await t.test('without an encoder left the language model encodes if it can, else the client gets Retry-After', async t => {
  for (const encoder of [e1, e2]) encoder.node.fail(RESET)
  await gateway.useAfresh(e1, e2, p1)
  const own = await gateway.ask({ pictures: [picture] })
  t.match([own.status, own.headers.get('x-epd-plan'), own.headers.get('x-epd-reason')], [200, 'hybrid', 'encoders failed'])
  t.equal(own.body.choices[0].message.content, right)
  await gateway.useAfresh(e1, e2, p2)
  isError(t, await gateway.ask({ pictures: [picture] }), { status: 503, code: 'encode_failed', again: true })
  for (const encoder of [e1, e2]) encoder.node.fail(busy(7))
  const full = await gateway.ask({ pictures: [picture] })
  isError(t, full, { status: 503, code: 'upstream_busy', again: true })
  t.equal(full.headers.get('retry-after'), '7')
  t.notMatch(JSON.stringify(full.body), /127\.0\.0\.1/, 'no node is named')
  await quiet(t, gateway, ...engines)
})

// links.test.ts kills one in mid-pull.
if (FULL) {
  await t.test('an encoder killed with -9 in the middle of a request is not missed, and is used again when it is back', async t => {
    await gateway.useAfresh(e1, e2, p1)
    const fresh = await Promise.all(Array.from({ length: 24 }, (_, i) => drawScene(10 + i)))
    const asked = gateway.ask({ pictures: fresh.filter(url => ownerOf(url, [e1, e2]) === mine).slice(0, 6) })
    await until(() => mine.node.seen > 0, 'its encode call is on')
    await mine.stop('SIGKILL')
    // The proxy in front of it still listens, so that no one can say that this request was its death.
    const answer = await asked
    t.equal(answer.status, 200, JSON.stringify(answer.body))
    t.ok(answer.headers.get('x-epd-encoders')?.split(',').every(id => id === next.id))
    t.ok((await gateway.status())[mine.id], 'it stays registered')
    await mine.startAgain()
    await gateway.linked(e1, e2, p1)
    t.equal((await gateway.ask({ pictures: [picture] })).headers.get('x-epd-encoders'), mine.id)
    await quiet(t, gateway, ...engines)
  })
}

await t.test('an encoder that restarts between its result and the migration: the request starts again at the plan', async t => {
  await gateway.useAfresh(mine, p1)
  const held = gate()
  p1.node.fail({ kind: 'wait', until: held.opened }, 1)
  const asked = gateway.stream({ pictures: [await drawScene(50)] })
  await until(() => p1.node.hits === 1, 'the request is on its way to the language model')
  await mine.killAndStartAgain()
  held.open()
  const stream = await asked
  t.equal(stream.status, 200)
  await stream.ended
  t.equal(stream.last, '[DONE]')
  t.ok([2, 3].includes(p1.node.seen), 'asked again, and once more where the restarted encoder was not linked yet')
  await quiet(t, gateway, mine, p1)
})

await t.test('a language model that fails before its first event is replaced once, streaming or not', async t => {
  for (const fault of [RESET, BROKEN, { kind: 'cut', after: 0 } as const]) {
    for (const streamed of FULL || fault === RESET ? [true, false] : [fault !== BROKEN]) {
      // One that has just failed would not be asked first.
      await gateway.useAfresh(e1, e2, p1, p2)
      p1.node.fail(fault)
      p2.node.heal()
      const question = { pictures: [picture] }
      if (streamed) {
        const stream = await gateway.stream(question)
        t.equal(stream.status, 200)
        await stream.ended
        t.equal(stream.last, '[DONE]')
      } else t.equal((await gateway.ask(question)).body.choices[0].message.content, right)
      // A kept connection that is reset is tried once more on a fresh one.
      t.same([p1.node.seen, p2.node.seen], [fault === RESET ? 2 : 1, 1], `${fault.kind}, ${streamed ? 'streamed' : 'whole'}`)
      await quiet(t, gateway, ...engines)
    }
  }
  for (const { node } of [p1, p2]) node.fail(BROKEN)
  const failed = await gateway.ask({ pictures: [picture] })
  t.equal(failed.status, 500)
  t.same(failed.body, { error: { message: 'why it broke', type: 'server_error', code: null, param: null } }, "the node's own reason")
  t.same([p1.node.seen, p2.node.seen], [1, 1], 'two attempts, no more')
  await quiet(t, gateway, ...engines)
})

await t.test('a language model that dies after its first event ends the stream with an error event', async t => {
  await gateway.useAfresh(e1, e2, p1, p2)
  p1.node.fail({ kind: 'cut', after: 2 })
  const cut = await gateway.stream({ pictures: [picture], more: { max_tokens: 50, ignore_eos: true } })
  t.equal(cut.status, 200)
  t.equal(await cut.ended, true, 'the answer itself ends as it should')
  t.match(cut.last, { error: { message: String, type: String, code: 'upstream_broken', param: null } })
  p1.node.heal()
  // For a moment the other one would come first.
  await gateway.useAfresh(e1, e2, p1, p2)
  const long = await gateway.stream({ pictures: [picture], more: { max_tokens: 2000, ignore_eos: true } })
  await until(() => long.events.length > 1, 'events have come')
  await p1.stop('SIGKILL')
  t.equal(await long.ended, true)
  t.match(long.last, { error: { code: 'upstream_broken' } })
  t.equal(p2.node.seen, 0, 'no other node is asked')
  await quiet(t, gateway, ...engines)
  t.equal((await gateway.ask({ pictures: [picture] })).status, 200, 'the other one serves')
  await p1.startAgain()
  await gateway.linked(...engines)
})

await t.test('a language model that hangs counts as dead after its timeout', async t => {
  await gateway.useAfresh(e1, e2, p1, p2)
  p1.node.fail({ kind: 'hang' })
  const start = performance.now()
  const stream = await gateway.stream({ pictures: [picture] })
  await stream.ended
  t.equal(stream.last, '[DONE]')
  t.same([p1.node.seen, p2.node.seen], [1, 1])
  t.ok(performance.now() - start >= timeouts.firstByte)
  await quiet(t, gateway, ...engines)

  await hasty.use(p1, p2)
  for (const { node } of [p1, p2]) node.fail({ kind: 'hang' })
  isError(t, await hasty.ask(), { status: 504, code: 'upstream_timeout', again: true })
  for (const { node } of [p1, p2]) node.fail({ kind: 'stall', after: 2 })
  const silent = await hasty.stream({ more: { max_tokens: 2000, ignore_eos: true } }).catch(() => undefined)
  if (silent !== undefined && silent.status === 200) {
    t.equal(await silent.ended, true)
    t.match(silent.last, { error: { code: 'upstream_broken' } }, 'silence in the middle of a stream ends it')
  }
  await quiet(t, hasty, p1, p2)
})

await t.test('nodes whose handshake hangs do not delay requests that others can serve', async t => {
  await gateway.useAfresh(mine, p1)
  next.node.fail({ kind: 'hang' }, Infinity, '/distserve/p2p_connect')
  await gateway.add(next)
  p2.node.fail({ kind: 'hang' }, Infinity, '/distserve/p2p_connect')
  await gateway.add(p2)
  await until(() => next.node.hits > 0 && p2.node.hits > 0, 'their handshakes are on')
  const moves = async (): Promise<string | undefined> => (await gateway.metrics()).split('\n').find(line => line.startsWith('epd_encode_moves_total'))
  const before = await moves()
  const answers = await Promise.all([...pictures, theirs].map(async url => await gateway.ask({ pictures: [url] })))
  t.same(answers.map(({ status, headers }) => [status, headers.get('x-epd-encoders')]), answers.map(() => [200, mine.id]))
  t.equal(await moves(), before, 'no timeout had to pass: none was asked to encode for the other')
  for (const { node } of [next, p2]) node.heal()
  await gateway.useAfresh(...engines)
  await quiet(t, gateway, ...engines)
})

await t.test('a 4xx of a node is passed on as it is: not tried again, no failure of the node', async t => {
  await gateway.useAfresh(e1, e2, p1, p2)
  const body = { error: { message: 'top_k must be less', type: 'invalid_request_error', code: 'made_up', param: 'top_k' }, extra: 1 }
  p1.node.fail({ kind: 'answer', status: 422, body })
  for (let i = 0; i < 7; i++) {
    const answer = await gateway.ask({ pictures: [picture] })
    t.equal(answer.status, 422)
    t.strictSame(answer.body, body)
    t.equal(answer.headers.get('retry-after'), null)
    t.match([answer.headers.get('x-epd-plan'), answer.headers.get('x-epd-encoders'), answer.headers.get('x-epd-trace-id')], ['e-pd', mine.id, /^[0-9a-f]{32}$/])
  }
  t.same([p1.node.seen, p2.node.seen], [7, 0])
  t.equal((await gateway.status())[p1.id]?.breakers.decode, 'closed')
  const real = await gateway.ask({ pictures: [picture], more: { top_p: 7 } })
  t.match([real.status, real.body.error.param], [422, 'top_k'])
  p1.node.heal()
  t.match((await gateway.ask({ pictures: [picture], more: { top_p: 7 } })), { status: 400, body: { error: { param: 'top_p' } } })
  await quiet(t, gateway, ...engines)
})

await t.test('a full node is passed over, and its Retry-After reaches the client when all are full', async t => {
  await gateway.useAfresh(e1, e2, p1, p2)
  p1.node.fail(busy(3))
  for (let i = 0; i < 7; i++) t.equal((await gateway.ask({ pictures: [picture] })).status, 200)
  t.equal((await gateway.status())[p1.id]?.breakers.decode, 'closed', 'being full is no failure')
  p2.node.fail(busy(4))
  const full = await gateway.stream({ pictures: [picture] })
  t.equal(full.status, 503)
  t.match(full.headers.get('retry-after'), /^[34]$/)
  await quiet(t, gateway, ...engines)
})

await t.test('an engine that gets SIGTERM finishes what it has, while others take the rest', async t => {
  await gateway.useAfresh(e1, e2, p1, p2)
  for (let round = 0; round < ROUNDS; round++) {
    const long = await gateway.stream({ pictures: [picture], more: { max_tokens: 100, ignore_eos: true } })
    await until(() => long.events.length > 0, 'events have come')
    const exit = p1.stop('SIGTERM')
    const encoding = mine.stop('SIGTERM')
    const answers = await Promise.all(pictures.map(async url => await gateway.ask({ pictures: [url] })))
    t.same(answers.map(answer => answer.status), pictures.map(() => 200))
    t.ok(answers.every(answer => answer.headers.get('x-epd-encoders') === next.id || answer.headers.get('x-epd-plan') === 'e-pd'))
    await long.ended
    t.equal(long.last, '[DONE]', 'the stream in flight is whole')
    t.same(await Promise.all([exit, encoding]), [0, 0])
    await Promise.all([p1.startAgain(), mine.startAgain()])
    await gateway.linked(...engines)
    await quiet(t, gateway, ...engines)
  }
})

await t.test('after its rest a node that flapped is tried by one request, then used as before', async t => {
  await flapping.linked(e1, e2, p1)
  const state = async (): Promise<string | undefined> => (await flapping.status())[next.id]?.breakers.encode
  const rested = async (): Promise<void> => { await until(async () => await state() === 'half-open', 'the rest is over') }
  await rested()
  const held = gate()
  next.node.fail({ kind: 'wait', until: held.opened }, 1)
  const trial = flapping.ask({ pictures: [theirs] })
  await until(() => next.node.seen === 1, 'the trial is on')
  t.equal((await flapping.ask({ pictures: [theirs] })).headers.get('x-epd-encoders'), mine.id, 'no other node takes it meanwhile')
  held.open()
  t.equal((await trial).headers.get('x-epd-encoders'), next.id)
  t.equal(await state(), 'closed')
  if (!FULL) return
  next.node.fail(RESET)
  for (let i = 0; i < 5; i++) await flapping.ask({ pictures: [theirs] })
  await rested()
  t.equal((await flapping.ask({ pictures: [theirs] })).status, 200)
  t.equal(await state(), 'open', 'a failed trial opens it again')
})

await t.test('whatever goes wrong at the same time, every client gets a proper answer and nothing is held', async t => {
  await gateway.useAfresh(...engines)
  const random = seededRandom(7)
  const choose = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)]!
  const faults: NodeFault[] = [RESET, BROKEN, busy(1), { kind: 'cut', after: 0 }, { kind: 'cut', after: 3 }, { kind: 'hold' }, { kind: 'none' }, { kind: 'none' }]
  const outcomes: Record<string, number> = {}
  const one = async (): Promise<void> => {
    choose(engines).node.fail(choose(faults), 1)
    const urls = pictures.slice(0, Math.floor(random() * 4))
    const stop = new AbortController()
    const leaves = random() < 0.2
    if (leaves) setTimeout(() => { stop.abort() }, random() * 300)
    const stream = await gateway.stream({ pictures: urls, more: { max_tokens: 30, ignore_eos: true }, signal: stop.signal }).catch((err: unknown) => { if (leaves) return undefined; throw err })
    const whole = await stream?.ended
    const outcome = stream === undefined || (leaves && whole === false) ? 'left' : stream.status !== 200 ? String(stream.status) : stream.last === '[DONE]' ? 'done' : 'broken off'
    if (outcome === 'broken off') t.match(stream!.last, { error: { code: 'upstream_broken' } })
    if (outcome.startsWith('5')) t.ok((outcome === '500' || stream!.headers.has('retry-after')) && stream!.headers.has('x-epd-trace-id'), outcome)
    t.match(outcome, /^(left|done|broken off|500|503|504)$/)
    outcomes[outcome] = (outcomes[outcome] ?? 0) + 1
  }
  for (let i = 0; i < MIXED; i += 8) await Promise.all(Array.from({ length: 8 }, one))
  for (const { node } of engines) node.heal()
  t.ok(outcomes.done! > MIXED / 3, JSON.stringify(outcomes))
  await quiet(t, gateway, ...engines)
  await gateway.linked(...engines)
})

await t.test('nothing is left of all this', async t => {
  await quiet(t, gateway, hasty, flapping, ...engines)
  t.same((await Promise.all(engines.map(async engine => await engine.remains()))).filter(Boolean), [])
  for (const [part, before] of filesAtStart) {
    if (before === undefined) continue
    await until(() => openFiles(part.pid)! <= before + 6, `${part instanceof Engine ? part.role : 'gateway'} has ${before} files open again, not ${openFiles(part.pid)}`).catch((err: Error) => { t.fail(err.message) })
  }
})
