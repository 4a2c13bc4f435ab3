import t from 'tap'
import type { MediaItem, NodeInfo, Role } from '../../adapters/adapter.ts'
import { planRequest, TimeLine, type Plan, type PlanOptions, type StageTimes } from '../../plugin/planning/index.ts'
import { EXPLORE_EVERY } from '../../plugin/planning/stage-times.ts'
import type { NodeSnapshot, RegistrySnapshot } from '../../plugin/registry/index.ts'
import { fakeAdapter } from '../helper/fake-node.ts'

/** What nodes would take, in milliseconds, for so many vision tokens. */
interface Script { encode (work: number): number, fed (work: number): number, own (work: number): number }

/** Another card encodes as fast as this one, but the features have to come over, and prefill is slower beside a vision tower. */
const SCRIPT: Script = { encode: work => 20 + 0.05 * work, fed: work => 25 + 0.02 * work, own: work => 15 + 0.07 * work }

function measured ({ encode, fed, own }: Script, works: readonly number[], begun = 0): StageTimes {
  const times: StageTimes = { encode: new TimeLine(), fed: new TimeLine(), own: new TimeLine(), begun }
  for (const work of works) {
    times.encode.add(work, encode(work))
    times.fed.add(work, fed(work))
    times.own.add(work, own(work))
  }
  return times
}

const SIZES = [300, 500, 800, 1_000, 1_500, 2_000, 400, 900, 1_200, 600]

function snapshot (load: { readonly tokens: number, readonly active: number }, vision: NodeInfo['vision'] = 'full', encoderTokens = 0): RegistrySnapshot {
  const node = (id: string, role: Role, own: object): NodeSnapshot => {
    const info: NodeInfo = { status: 'healthy', models: ['m'], role, backend: 'fake', produces: role === 'encoder' ? ['features:fake/1'] : [], accepts: role === 'encoder' ? [] : ['features:fake/1'], vision: role === 'encoder' ? 'full' : vision }
    const load = { requests: 0, tokens: 0, work: 0, usedAt: 0, ...own }
    return { id, url: id, role, models: ['m'], state: 'healthy', adapter: fakeAdapter, info, speed: 1, checkMedia: false, notes: [], load, breakers: { encode: 'closed', prefill: 'closed', decode: 'closed' }, links: new Map() }
  }
  const nodes = [node('e', 'encoder', { tokens: encoderTokens }), node('pd', 'hybrid', { ...load, requests: load.active })]
  return { version: 1, nodes, byId: new Map(nodes.map(one => [one.id, one])), models: ['m'], link: () => 'linked' }
}

const options: PlanOptions = { bypass: 'auto', routing: { policy: 'least-tokens', nodeTokens: 4_096, encoderTokens: 16_384, smallItem: 256, disaggregate: 'auto', disaggregateTokens: 1_024, panicThreshold: 50 } }
const IDLE = { tokens: 0, active: 0 }

function plan (tokens: number, nodes: RegistrySnapshot, times: StageTimes | undefined, more: Partial<PlanOptions> = {}): string {
  const picture: MediaItem = { index: 0, message: 0, part: 0, path: 'messages[0].content[0]', modality: 'image', type: 'image_url', url: { start: 0, end: 0 }, span: { start: 0, end: 0 }, routeKey: 'a', remote: false, tokens }
  const { topology, reason } = planRequest({ model: 'm', media: [picture], times: role => role === 'hybrid' ? times : undefined }, nodes, { ...options, ...more }) as Plan
  return `${topology}: ${reason}`
}

t.test('at light load the language model encodes where encoders are slower, at heavy load they do', async t => {
  const times = measured(SCRIPT, SIZES)
  t.match(plan(1_000, snapshot(IDLE), times), /^hybrid: encoders are slower, as measured: 11\d ms against 8\d ms$/)
  t.equal(plan(1_000, snapshot({ tokens: 4_000, active: 8 }), times), 'e-pd: 1 item on 1 encoder')
  t.equal(plan(1_000, snapshot({ tokens: 0, active: 8 }), times), 'e-pd: 1 item on 1 encoder', 'what it generates beside slows its vision tower')
  t.match(plan(1_000, snapshot({ tokens: 0, active: 8 }, 'full', 9_000), times), /^hybrid: encoders are slower/, 'unless the encoders are busier')
})

t.test('the crossing is found also where only light load was measured, of one size', async t => {
  const times = measured(SCRIPT, Array.from({ length: 20 }, () => 1_000))
  t.match(plan(1_000, snapshot(IDLE), times), /^hybrid: encoders are slower/)
  t.match(plan(1_000, snapshot({ tokens: 6_000, active: 9 }), times), /^e-pd/)
})

t.test('where encoders are faster small pictures go to them, too', async t => {
  const fast = measured({ ...SCRIPT, encode: () => 1, fed: () => 2 }, SIZES)
  t.equal(plan(100, snapshot(IDLE), undefined), 'hybrid: small items')
  t.equal(plan(100, snapshot(IDLE), fast), 'e-pd: 1 item on 1 encoder')
})

t.test('what is not known changes nothing', async t => {
  const few = measured(SCRIPT, SIZES.slice(0, 7))
  t.equal(plan(1_000, snapshot(IDLE), few), 'e-pd: 1 item on 1 encoder', 'too few samples')
  t.equal(plan(100, snapshot(IDLE), few), 'hybrid: small items')
  const half = { ...measured(SCRIPT, SIZES), own: new TimeLine() }
  t.equal(plan(1_000, snapshot(IDLE), half), 'e-pd: 1 item on 1 encoder', 'one way only')
  t.equal(plan(1_000, snapshot(IDLE), measured(SCRIPT, SIZES), { bypass: 'never' }), 'e-pd: 1 item on 1 encoder')
  t.equal(plan(1_000, snapshot(IDLE, 'features'), measured(SCRIPT, SIZES)), 'e-pd: 1 item on 1 encoder', 'a node without vision has no other way')
})

t.test('one request in so many goes the other way, whichever that is', async t => {
  const turn = (times: StageTimes): StageTimes => ({ ...times, begun: EXPLORE_EVERY - 1 })
  const nothing = measured(SCRIPT, [])
  t.equal(plan(1_000, snapshot(IDLE), turn(nothing)), 'hybrid: to measure')
  t.equal(plan(100, snapshot(IDLE), turn(nothing)), 'e-pd: 1 item on 1 encoder, to measure')
  t.equal(plan(1_000, snapshot(IDLE), turn(measured(SCRIPT, SIZES))), 'e-pd: 1 item on 1 encoder, to measure')
  t.equal(plan(1_000, snapshot(IDLE, 'features'), turn(nothing)), 'e-pd: 1 item on 1 encoder')
  t.equal(plan(1_000, snapshot(IDLE), turn(nothing), { bypass: 'never' }), 'e-pd: 1 item on 1 encoder')
  const counts = Array.from({ length: 10 * EXPLORE_EVERY }, (_, begun) => plan(1_000, snapshot(IDLE), { ...nothing, begun }))
  t.equal(counts.filter(one => one.endsWith('to measure')).length, 10)
})

t.test('a line through what was measured', async t => {
  const line = new TimeLine()
  for (const work of SIZES) line.add(work, 10 + 0.1 * work)
  const near = (found: number | undefined, wanted: number): boolean => Math.abs(found! - wanted) < 0.05 * wanted
  t.ok(near(line.at(700), 80))
  t.ok(near(line.at(20_000), 2_010), String(line.at(20_000)))
  for (let i = 0; i < 300; i++) line.add(SIZES[i % SIZES.length]!, 40 + 0.3 * SIZES[i % SIZES.length]!)
  t.ok(near(line.at(700), 250), 'old samples fade')
  const falling = new TimeLine()
  for (const work of SIZES) falling.add(work, 3_000 - work)
  t.ok(falling.at(1e6)! >= 0 && falling.at(1e6)! === falling.at(1), 'more work never takes less time')
  const still = new TimeLine()
  for (let i = 0; i < 20; i++) still.add(0, 7)
  t.ok(near(still.at(500), 7))
})
