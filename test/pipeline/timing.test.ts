/** What stages take is measured where requests pass, and the next plan goes by it. */
import t, { type Test } from 'tap'
import type { EpdOptions } from '../../plugin/index.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeNode, type FakeNodeOptions } from '../helper/fake-node.ts'

const MODEL = 'vlm'
/** As many as say something. */
const ENOUGH = 8

async function fixture (t: Test, nodes: readonly FakeNodeOptions[], options: EpdOptions = {}) {
  const { app, url } = await buildGateway(t, { nodes: await Promise.all(nodes.map(async node => await FakeNode.start(t, node))), options: { bypass: 'auto', ...options } })
  const ask = async (stream = true): Promise<string> => {
    const answer = await post(`${url}/v1/chat/completions`, { ...chat('?', pictureUrl('a')), stream })
    await answer.text()
    return `${answer.status} ${answer.headers.get('x-epd-plan')}: ${answer.headers.get('x-epd-reason')}`
  }
  const known = (role: string) => app.epd.gateway.timings.of(MODEL, role)
  return { ask, known }
}

t.test('each way is measured, one request in 32 goes the other way, and the faster one is taken from then on', async t => {
  const { ask, known } = await fixture(t, [{ role: 'encoder' }, { vision: 'full' }])
  t.equal(known('hybrid'), undefined)
  for (let i = 0; i < ENOUGH; i++) t.equal(await ask(), '200 e-pd: 1 item on 1 encoder')
  const times = known('hybrid')!
  t.ok(times.encode.at(1)! > 0)
  t.ok(times.fed.at(1)! > 0)
  t.equal(times.own.at(1), undefined)
  const plans: string[] = []
  for (let i = ENOUGH; i < 32; i++) plans.push(await ask())
  t.equal(plans.pop(), '200 hybrid: to measure')
  t.same([...new Set(plans)], ['200 e-pd: 1 item on 1 encoder'])

  for (let i = 0; i < ENOUGH; i++) times.own.add(1_024, 1)
  for (let i = 0; i < ENOUGH; i++) times.encode.add(1_024, 1e6)
  t.match(await ask(), /^200 hybrid: encoders are slower, as measured: \d+ ms against \d+ ms$/)
  for (let i = 0; i < 200; i++) times.own.add(1_024, 1e9)
  t.equal(await ask(), '200 e-pd: 1 item on 1 encoder')
})

t.test('a whole answer says nothing of the first token, and what fails nothing at all', async t => {
  const { ask, known } = await fixture(t, [{ role: 'encoder' }, { vision: 'full' }])
  for (let i = 0; i < ENOUGH; i++) t.equal(await ask(false), '200 e-pd: 1 item on 1 encoder')
  const { encode, fed } = known('hybrid')!
  t.ok(encode.at(1)! > 0)
  t.equal(fed.at(1), undefined)
})

t.test('a prefill node is measured by its own answer', async t => {
  const { ask, known } = await fixture(t, [{ role: 'encoder' }, { role: 'prefill', vision: 'full' }, { role: 'decode', vision: 'none' }])
  for (let i = 0; i < ENOUGH; i++) t.equal(await ask(false), '200 e-p-d: 1 item on 1 encoder, no node does both')
  t.equal(known('hybrid'), undefined)
  t.ok(known('prefill')!.encode.at(1)! > 0)
  t.ok(known('prefill')!.fed.at(1)! > 0)
})
