/** Prefill and decode nodes that die, hang or lose what they had, on real engines; and many requests at once over two of each. */
import t from 'tap'
import { seededRandom } from '../helper/pictures.ts'
import { drawScene } from '../helper/scenes.ts'
import { Engine, gate, Gateway, GatewayProcess, isError, openFiles, quiet, settle, until } from './house.ts'
import type { NodeFault } from './faulty-node.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const ROUNDS = FULL ? 10 : 1
const AT_ONCE = FULL ? 200 : 16
const RESET: NodeFault = { kind: 'reset' }
/** Where a gateway ends a lease that no engine will ACK. */
const FREE_CACHE = '/distserve/free_cache'

const timeouts = { encode: 5000, prefill: 3000, firstByte: 5000, answer: 15_000, idle: 10_000 }
const flags = ['--max-queue', '256']
const [gateway, encoder, p1, p2, d1, d2] = await Promise.all([
  // Of idle nodes the one that was added first is asked first.
  GatewayProcess.start(t, { timeouts }),
  Engine.start(t, 'encoder', { flags }),
  Engine.start(t, 'prefill', { flags: [...flags, '--no-vision'] }),
  Engine.start(t, 'prefill', { flags: [...flags, '--no-vision'] }),
  Engine.start(t, 'decode', { flags }),
  Engine.start(t, 'decode', { flags })
])
const engines = [encoder, p1, p2, d1, d2]
const pictures = await Promise.all([1, 2, 3, 4].map(drawScene))

await gateway.use(...engines)
const right = await gateway.ask({ pictures })
const content = right.body.choices[0].message.content as string
await settle(gateway, ...engines)
const filesAtStart = new Map([gateway, ...engines].map(part => [part, openFiles(part.pid)]))

t.afterEach(async () => { for (const { node } of engines) node.heal() })

/** ACKs that ended a lease of these nodes. */
async function acks (...prefills: readonly Engine[]): Promise<number> {
  return (await Promise.all(prefills.map(async engine => await engine.gauge('epd_acks_total')))).reduce((sum, count) => sum + count, 0)
}

await t.test('with no fault requests with pictures go E -> P -> D', async t => {
  t.match([right.status, right.headers.get('x-epd-plan')], [200, 'e-p-d'], JSON.stringify(right.body))
  t.equal((await gateway.ask()).headers.get('x-epd-plan'), 'p-d')
})

await t.test('a decode node that fails before its first byte: another pair answers, and P\'s blocks are freed', async t => {
  for (const fault of [RESET, { kind: 'cut', after: 0 }, { kind: 'answer', status: 500, body: { error: { message: 'broken', type: 'server_error', code: null, param: null } } }] as NodeFault[]) {
    for (const streamed of FULL || fault === RESET ? [true, false] : [fault.kind === 'cut']) {
      await gateway.useAfresh(...engines)
      for (const { node } of [p1, p2]) node.fail({ kind: 'none' }, Infinity, FREE_CACHE)
      d1.node.fail(fault)
      d2.node.heal()
      if (streamed) {
        const stream = await gateway.stream({ pictures })
        await stream.ended
        t.equal(stream.last, '[DONE]')
      } else t.equal((await gateway.ask({ pictures })).body.choices[0].message.content, content)
      // A kept connection that is reset is tried once more on a fresh one.
      t.same([d1.node.seen, d2.node.seen], [fault === RESET ? 2 : 1, 1], `${fault.kind}, ${streamed ? 'streamed' : 'whole'}`)
      await quiet(t, gateway, ...engines)
      t.equal(p1.node.seen + p2.node.seen, 1, 'the handoff that came to nothing was ended by one call, the other by its ACK')
    }
  }
})

await t.test('a decode node killed with -9 before its first byte is not missed', async t => {
  for (let round = 0; round < ROUNDS; round++) {
    await gateway.useAfresh(...engines)
    d1.node.fail({ kind: 'hold' }, 1)
    const asked = gateway.ask({ pictures })
    await until(() => d1.node.hits === 1, 'the request has reached D')
    await d1.stop('SIGKILL')
    const answer = await asked
    t.match([answer.status, answer.headers.get('x-epd-plan')], [200, 'e-p-d'])
    t.equal(answer.body.choices[0].message.content, content)
    await quiet(t, gateway, ...engines)
    await d1.startAgain()
    await gateway.linked(...engines)
  }
})

await t.test('a prefill node killed with -9 after prefill: the migration fails cleanly, and the request starts again', async t => {
  for (let round = 0; round < ROUNDS; round++) {
    await gateway.useAfresh(...engines)
    const held = gate()
    for (const { node } of [d1, d2]) node.fail({ kind: 'wait', until: held.opened }, 1)
    const asked = gateway.ask({ pictures })
    await until(() => d1.node.hits + d2.node.hits === 1, 'the handoff is on its way to D')
    const dead = p1.node.seen > 0 ? p1 : p2
    await dead.stop('SIGKILL')
    held.open()
    const answer = await asked
    t.equal(answer.status, 200, JSON.stringify(answer.body))
    t.equal(answer.body.choices[0].message.content, content)
    await dead.startAgain()
    await gateway.linked(...engines)
    await quiet(t, gateway, ...engines)
  }
})

await t.test('a prefill node that restarts between prefill and migration is never answered from', async t => {
  await gateway.useAfresh(encoder, p1, p2, d1)
  const held = gate()
  d1.node.fail({ kind: 'wait', until: held.opened }, 1)
  const asked = gateway.ask({ pictures })
  await until(() => d1.node.hits === 1, 'the handoff is on its way to D')
  const restarted = p1.node.seen > 0 ? p1 : p2
  await restarted.killAndStartAgain()
  held.open()
  const answer = await asked
  t.equal(answer.status, 200, JSON.stringify(answer.body))
  t.equal(answer.body.choices[0].message.content, content)
  t.ok([2, 3].includes(d1.node.seen), 'D was asked again')
  await gateway.linked(encoder, p1, p2, d1)
  await quiet(t, gateway, encoder, p1, p2, d1)
})

await t.test('a prefill node that fails in any way is replaced', async t => {
  for (const fault of (FULL ? [RESET, { kind: 'hang' }, { kind: 'hold' }, { kind: 'cut', after: 0 }] : [RESET, { kind: 'hang' }]) as NodeFault[]) {
    await gateway.useAfresh(...engines)
    p1.node.fail(fault)
    p2.node.heal()
    t.equal((await gateway.ask({ pictures })).body.choices[0].message.content, content, fault.kind)
    // A prefill call that meets a reset is sent once more, in case a kept connection had just been closed.
    t.same([p1.node.seen, p2.node.seen], [fault.kind === 'reset' ? 2 : 1, 1], fault.kind)
    await quiet(t, gateway, ...engines)
  }
})

await t.test('without a decode node that answers the client gets Retry-After', async t => {
  await gateway.useAfresh(...engines)
  for (const { node } of [d1, d2]) node.fail(RESET)
  isError(t, await gateway.ask({ pictures }), { status: 503, code: 'upstream_failed', again: true })
  await quiet(t, gateway, ...engines)
})

await t.test('a client that leaves at any stage leaves nothing behind', async t => {
  await gateway.useAfresh(...engines)
  const stages = [[encoder], [p1, p2], [d1, d2]]
  for (const stage of stages) {
    for (const kind of ['hang', 'hold'] as const) {
      for (const { node } of engines) node.heal()
      for (const { node } of stage) node.fail({ kind })
      const stop = new AbortController()
      const asked = gateway.ask({ pictures, signal: stop.signal })
      await until(() => stage.some(({ node }) => kind === 'hang' ? node.hits > 0 : node.answered > 0), `${stage[0]!.role}: ${kind}`)
      stop.abort()
      await t.rejects(asked)
      await quiet(t, gateway, ...engines)
    }
  }
})

await t.test(`${AT_ONCE} requests at once over two pairs; a third are cancelled at random moments`, async t => {
  // One that has the patience a slow machine needs: this is not about timeouts.
  const patient = await Gateway.here(t)
  await patient.use(...engines)
  const random = seededRandom(11)
  const before = await acks(p1, p2)
  const outcomes: Record<string, number> = {}
  await Promise.all(Array.from({ length: AT_ONCE }, async (_, i) => {
    const stop = new AbortController()
    const leaves = random() < 1 / 3
    if (leaves) setTimeout(() => { stop.abort() }, random() * (FULL ? 8000 : 2000))
    const question = { pictures: pictures.slice(0, i % 5), more: { max_tokens: 5 + i % 30, ignore_eos: true }, signal: stop.signal }
    const stream = await patient.stream(question).catch((err: unknown) => { if (leaves) return undefined; throw err })
    const whole = await stream?.ended
    const outcome = stream === undefined || (leaves && whole === false) ? 'left' : stream.status === 200 && stream.last === '[DONE]' ? 'done' : `${stream.status} ${JSON.stringify(stream.last)}`
    outcomes[outcome] = (outcomes[outcome] ?? 0) + 1
  }))
  t.same(Object.keys(outcomes).filter(outcome => outcome !== 'done' && outcome !== 'left'), [], JSON.stringify(outcomes))
  t.ok(outcomes.done! > AT_ONCE / 2)
  await quiet(t, patient, ...engines)
  t.ok(await acks(p1, p2) - before >= outcomes.done!, 'every answer came by a handoff that was ACKed')
})

await t.test('nothing is left of all this', async t => {
  await quiet(t, gateway, ...engines)
  t.same((await Promise.all(engines.map(async engine => await engine.remains()))).filter(Boolean), [])
  for (const [part, before] of filesAtStart) {
    if (before === undefined) continue
    await until(() => openFiles(part.pid)! <= before + 6, `${part instanceof Engine ? part.role : 'gateway'} has ${before} files open again, not ${openFiles(part.pid)}`).catch((err: Error) => { t.fail(err.message) })
  }
})
