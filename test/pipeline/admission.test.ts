/** Who may have vision work done, and when. */
import t from 'tap'
import { Admission, type EncoderPool, type Pass, type Work } from '../../plugin/pipeline/admission.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { seeded } from '../helper/random.ts'
import { until } from '../helper/until.ts'

const OPTIONS = { visionTokens: 100, encoderTime: 1_000, queue: 2, wait: 10_000, retryAfter: 3 }
const NONE: EncoderPool = { encoders: 0, rate: undefined }
const { signal } = new AbortController()

const work = (tokens: number, more: Partial<Work> = {}): Work => ({ tokens, model: 'vlm', ...more })
/** Everything that a promise chain has to do is done. */
const settled = (): Promise<void> => new Promise(resolve => setImmediate(resolve))

t.test('requests are let in by vision tokens, first come first served, and refused where they do not fit the queue', async t => {
  const admission = new Admission(OPTIONS, () => NONE)
  const first = await admission.enter(work(60), signal)
  const second = admission.enter(work(60), signal)
  const third = admission.enter(work(10), signal)
  t.same(admission.stats, { inFlight: 60, waiting: 2, refused: 0 }, 'the third fits, but does not overtake')
  await t.rejects(admission.enter(work(1), signal), { code: 'EPD_ERR_OVERLOADED', retryAfter: 3 })
  first.release()
  first.release()
  const passes = await Promise.all([second, third])
  t.same(admission.stats, { inFlight: 70, waiting: 0, refused: 1 })

  const big = admission.enter(work(1_000), signal)
  const leaving = new AbortController()
  const gone = admission.enter(work(5), leaving.signal)
  t.equal(admission.stats.waiting, 2)
  leaving.abort(new Error('gone'))
  await t.rejects(gone, { message: 'gone' })
  for (const pass of passes) pass.release()
  ;(await big).release()
  t.same(admission.stats, { inFlight: 0, waiting: 0, refused: 1 }, 'larger than the bound: alone')
})

t.test('encoders get as much as they can do in encoderTime, and what would wait too long is refused at once', async t => {
  const pool: { encoders: number, rate: number | undefined } = { encoders: 2, rate: undefined }
  const admission = new Admission({ visionTokens: 0, encoderTime: 2_000, queue: 100, wait: 5_000, retryAfter: 1 }, () => pool)
  const passes = [await admission.enter(work(32_000), signal)]
  const waiting = admission.enter(work(1_000), signal)
  t.equal(admission.stats.waiting, 1, 'before anything is measured, each encoder gets 16,384')
  pool.rate = 1_000
  passes[0]!.leaveEncoders()
  passes.push(await waiting)
  t.equal(admission.stats.inFlight, 33_000, 'the first is still in flight, at its language model')
  passes.push(await admission.enter(work(1_000), signal))
  const queued = Array.from({ length: 5 }, () => admission.enter(work(1_000), signal))
  t.equal(admission.stats.waiting, 5, '2 s of work are in flight, 5 s wait')
  await t.rejects(admission.enter(work(1_000), signal), { code: 'EPD_ERR_OVERLOADED', retryAfter: 6 })
  await t.rejects(admission.enter(work(4_000), signal), { code: 'EPD_ERR_OVERLOADED', retryAfter: 9 })
  for (let i = 0; i < 5; i++) {
    passes[1 + i]!.leaveEncoders()
    passes.push(await queued[i]!)
  }
  for (const pass of passes) pass.release()
  t.same(admission.stats, { inFlight: 0, waiting: 0, refused: 2 })
})

t.test('a model whose encoders are busy holds up no other', async t => {
  const admission = new Admission({ ...OPTIONS, visionTokens: 0 }, model => model === 'none' ? NONE : { encoders: 1, rate: 100 })
  const passes = [await admission.enter(work(100), signal)]
  const held = admission.enter(work(50), signal)
  for (const model of ['other', 'none']) passes.push(await admission.enter(work(90, { model }), signal))
  t.equal(admission.stats.waiting, 1)
  passes[0]!.release()
  passes.push(await held)
  for (const pass of passes) pass.release()
  t.same(admission.stats, { inFlight: 0, waiting: 0, refused: 0 })
})

/** Lets one request in at a time, and says in which order they came. */
async function order (admission: Admission, asked: ReadonlyArray<Partial<Work> & { name: string }>): Promise<string[]> {
  const served: string[] = []
  const holder = await admission.enter(work(100), signal)
  const all = asked.map(async ({ name, ...more }) => {
    const pass = await admission.enter(work(100, more), signal).catch(() => undefined)
    if (pass === undefined) return
    served.push(name)
    await settled()
    pass.release()
  })
  holder.release()
  await Promise.all(all)
  return served
}

t.test('higher priorities go first, then tenants in turn', async t => {
  const admission = new Admission({ ...OPTIONS, queue: 100 }, () => NONE)
  t.strictSame(await order(admission, [
    { name: 'a1', tenant: 'a' }, { name: 'a2', tenant: 'a' }, { name: 'a3', tenant: 'a' },
    { name: 'b1', tenant: 'b' }, { name: 'low', tenant: 'c', priority: -1 }, { name: 'b2', tenant: 'b' }, { name: 'high', tenant: 'a', priority: 5 }
  ]), ['high', 'a1', 'b1', 'a2', 'b2', 'a3', 'low'])
})

t.test('a flood of one tenant fills no queue of others', async t => {
  const admission = new Admission({ ...OPTIONS, queue: 4 }, () => NONE)
  const flood = Array.from({ length: 10 }, (_, i) => ({ name: `a${i}`, tenant: 'a' }))
  t.strictSame(await order(admission, [...flood, { name: 'b0', tenant: 'b' }, { name: 'b1', tenant: 'b' }, { name: 'b2', tenant: 'b' }, { name: 'b3', tenant: 'b' }]), ['a0', 'b0', 'a1', 'b1'])
  t.match(admission.stats, { waiting: 0, inFlight: 0, refused: 10 })
})

t.test('whatever comes and goes, all that was let in is given back', async t => {
  const pick = seeded(11)
  const rates = [undefined, 50, 500]
  const admission = new Admission({ ...OPTIONS, queue: 5 }, () => ({ encoders: pick(3), rate: rates[pick(3)] }))
  const passes: Pass[] = []
  const ended: Array<Promise<unknown>> = []
  for (let i = 0; i < 2_000; i++) {
    const leaving = new AbortController()
    ended.push(admission.enter(work(1 + pick(150), { tenant: `t${pick(3)}`, priority: pick(3), model: `m${pick(2)}` }), leaving.signal).then(pass => { passes.push(pass) }, () => {}))
    if (pick(4) === 0) leaving.abort(new Error('gone'))
    if (pick(3) === 0) passes[pick(passes.length)]?.leaveEncoders()
    if (pick(2) === 0) passes.splice(pick(passes.length), 1)[0]?.release()
    await settled()
  }
  await until(() => {
    for (const pass of passes.splice(0)) pass.release()
    return admission.stats.waiting === 0 && admission.stats.inFlight === 0
  }, 'nothing is in flight')
  await Promise.all(ended)
  t.match(admission.stats, { inFlight: 0, waiting: 0 })
})

t.test('an overloaded encoder sheds: text is served, and what would wait too long gets 429, nothing a 503', async t => {
  const encoder = await FakeNode.start(t, { role: 'encoder' })
  const pd = await FakeNode.start(t, { vision: 'features' })
  const { url, app } = await buildGateway(t, { nodes: [encoder, pd], options: { admission: { encoderTime: 200, wait: 1_000 } } })
  const ask = async (body: object): Promise<Response> => await post(`${url}/v1/chat/completions`, body)
  const { admission } = app.epd.gateway
  let open!: () => void
  const hold = new Promise<void>(resolve => { open = resolve })
  encoder.encodeFaults.push(...Array.from({ length: 16 }, () => ({ hold })))
  // 16 pictures of 1,024 tokens are let in to an encoder that has not been measured.
  const burst = Array.from({ length: 40 }, (_, i) => ask(chat('?', pictureUrl(i))))
  await until(() => encoder.calls('/encode').length === 16 && admission.stats.waiting === 24, 'the others wait in the gateway')
  t.equal((await ask(chat('?'))).status, 200, 'text is served')
  await until(() => admission.stats.refused === 24, 'those that waited too long are refused')
  open()
  const answers = await Promise.all(burst)
  t.same(answers.map(({ status }) => status).sort(), [...Array.from({ length: 16 }, () => 200), ...Array.from({ length: 24 }, () => 429)])
  t.ok(answers.every(({ status, headers }) => status === 200 || Number(headers.get('retry-after')) >= 1))
  t.match(admission.stats, { inFlight: 0, waiting: 0 })
  t.equal((await ask(chat('?', pictureUrl('later')))).status, 200)
})
