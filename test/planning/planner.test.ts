import t from 'tap'
import type { MediaItem, NodeInfo, Role } from '../../adapters/adapter.ts'
import { planRequest, rank, type Plan, type PlanOptions, type Refusal } from '../../plugin/planning/index.ts'
import type { LinkState, LinkView, NodeSnapshot, NodeState, RegistrySnapshot } from '../../plugin/registry/index.ts'
import { fakeAdapter } from '../helper/fake-node.ts'

interface Sketch {
  readonly id: string
  readonly role?: Role
  readonly models?: readonly string[]
  readonly state?: NodeState
  readonly vision?: NodeInfo['vision']
  readonly fingerprint?: string
  readonly accepts?: readonly string[]
  readonly requests?: number
  readonly tokens?: number
  readonly speed?: number
  readonly usedAt?: number
  readonly broken?: 'encode' | 'prefill' | 'decode'
  readonly maxPrefillTokens?: number
  readonly standalone?: boolean
  readonly failing?: boolean
}

const FORMAT = 'features:fake/1'
const KV = 'kv:fake/1'
const E = (id: string, more: Partial<Sketch> = {}): Sketch => ({ id, role: 'encoder', ...more })
const PD = (id: string, more: Partial<Sketch> = {}): Sketch => ({ id, vision: 'features', ...more })
const P = (id: string, more: Partial<Sketch> = {}): Sketch => ({ id, role: 'prefill', vision: 'features', ...more })
const D = (id: string, more: Partial<Sketch> = {}): Sketch => ({ id, role: 'decode', vision: 'none', ...more })
const closed = { encode: 'closed', prefill: 'closed', decode: 'closed' } as const

function node ({ id, role = 'hybrid', models = ['m'], state = 'healthy', vision = 'full', fingerprint, accepts, requests = 0, tokens = 0, speed = 1, usedAt = 0, broken, maxPrefillTokens, standalone, failing }: Sketch): NodeSnapshot {
  const formats = { encoder: [[FORMAT], []], hybrid: [[], [FORMAT]], prefill: [[KV], [FORMAT]], decode: [[], [KV]] }[role]
  const info: NodeInfo = { status: 'healthy', models, role, backend: 'fake', fingerprint, produces: formats[0]!, accepts: accepts ?? formats[1]!, vision, maxPrefillTokens, standalone }
  const breakers = broken === undefined ? closed : { ...closed, [broken]: 'open' as const }
  return { id, url: id, role, models, state, adapter: fakeAdapter, info, speed, checkMedia: false, notes: [], load: { requests, tokens, work: requests * 300 + tokens, usedAt, failing }, breakers, links: new Map() }
}

function snapshot (sketches: readonly Sketch[], links: Record<string, LinkState> = {}): RegistrySnapshot {
  const nodes = sketches.map(node)
  return { version: 1, nodes, byId: new Map(nodes.map(one => [one.id, one])), models: ['m'], link: (from, to) => links[`${from}>${to}`] ?? 'linked' }
}

function item (routeKey: string, tokens = 1_000, index = 0): MediaItem {
  return { index, message: 0, part: index, path: `messages[0].content[${index}]`, modality: 'image', type: 'image_url', url: { start: 0, end: 0 }, span: { start: 0, end: 0 }, routeKey, remote: false, tokens }
}

const options = (more: Partial<PlanOptions> = {}): PlanOptions => ({ bypass: 'auto', routing: { policy: 'least-tokens', nodeTokens: 4_096, encoderTokens: 16_384, smallItem: 256, disaggregate: 'auto', disaggregateTokens: 1_024, panicThreshold: 50 }, ...more })
const pictures = (...keys: string[]): MediaItem[] => keys.map((key, i) => item(key, 1_000, i))
const text = { model: 'm', media: [] }
const one = { model: 'm', media: pictures('a') }
const small = { model: 'm', media: [item('a', 256), item('b', 10, 1)] }

function plan (...args: Parameters<typeof planRequest>): Plan {
  const found = planRequest(...args)
  if ('refused' in found) throw new Error(`refused: ${found.refused} (${found.reason})`)
  return found
}

function brief (found: Plan | Refusal): string {
  if ('refused' in found) return `${found.refused}${found.param === undefined ? '' : ` (${found.param})`}: ${found.reason}`
  return `${found.topology} ${found.prefill === undefined ? '' : `${found.prefill.id}>`}${found.node.id}: ${found.reason}`
}

t.test('each situation has its plan and its reason', async t => {
  const never = options({ bypass: 'never' })
  const long = { ...text, promptTokens: 1_024 }
  const rows: Array<[string, string, Parameters<typeof planRequest>]> = [
    ['text goes to the language model', 'pd pd1: text only', [text, snapshot([E('e1'), PD('pd1')]), options()]],
    ['the least loaded one', 'pd pd2: text only', [text, snapshot([PD('pd1', { requests: 3 }), PD('pd2', { requests: 2 })]), options()]],
    ['load counts by speed', 'pd pd1: text only', [text, snapshot([PD('pd1', { requests: 3, speed: 4 }), PD('pd2', { requests: 2 })]), options()]],
    ['equal requests: fewer vision tokens', 'pd pd2: text only', [text, snapshot([PD('pd1', { tokens: 9 }), PD('pd2')]), options()]],
    ['equal ones take turns', 'pd pd2: text only', [text, snapshot([PD('pd1', { usedAt: 3 }), PD('pd2', { usedAt: 1 }), PD('pd3', { usedAt: 2 })]), options()]],
    ['a node that failed is avoided', 'pd pd2: text only', [text, snapshot([PD('pd1'), PD('pd2', { requests: 9 })]), options(), new Set(['pd1'])]],
    ['unless it is the only one', 'pd pd1: text only', [text, snapshot([PD('pd1')]), options(), new Set(['pd1'])]],
    ['one that has failed others a moment ago, too', 'pd pd2: text only', [text, snapshot([PD('pd1', { failing: true }), PD('pd2', { requests: 9 })]), options()]],
    ['unless the other has failed this request', 'pd pd1: text only', [text, snapshot([PD('pd1', { failing: true }), PD('pd2')]), options(), new Set(['pd2'])]],
    ['or it is the only one', 'pd pd1: text only', [text, snapshot([PD('pd1', { failing: true })]), options()]],
    ['another way is taken where D has failed others', 'pd pd1: text only, long prompt', [long, snapshot([PD('pd1'), P('p1'), D('d1', { failing: true })]), options()]],
    ['but not one that has failed this request', 'p-d p1>d1: long prompt', [long, snapshot([PD('pd1'), P('p1'), D('d1', { failing: true })]), options(), new Set(['pd1'])]],
    ['an open breaker excludes', 'pd pd2: text only', [text, snapshot([PD('pd1', { broken: 'decode' }), PD('pd2', { requests: 9 })]), options()]],
    ['an unknown model is refused', 'EPD_ERR_MODEL_NOT_FOUND: no node serves this model', [{ model: 'x', media: [] }, snapshot([PD('pd1')]), options()]],
    ['no node has a model yet', 'EPD_ERR_NO_NODE: no node is registered', [text, snapshot([]), options()]],
    ['a node is still starting', 'EPD_ERR_NO_NODE: nodes are starting', [{ model: 'x', media: [] }, snapshot([PD('pd1'), PD('pd2', { models: [], state: 'unknown' })]), options()]],
    ['a model that only encoders know', 'EPD_ERR_NO_NODE: no node of this model generates', [text, snapshot([E('e1')]), options()]],
    ['no healthy node', 'EPD_ERR_NO_NODE: none of 1 nodes is healthy', [text, snapshot([PD('pd1', { state: 'unhealthy' })]), options()]],
    ['draining is not healthy', 'EPD_ERR_NO_NODE: none of 1 nodes is healthy', [text, snapshot([PD('pd1', { state: 'draining' })]), options()]],
    ['an opaque body prefers nodes that see', 'pd pd2: text only', [{ ...text, opaque: true }, snapshot([PD('pd1'), PD('pd2', { vision: 'full', requests: 5 })]), options()]],

    ['an encoder encodes a picture', 'e-pd pd1: 1 item on 1 encoder', [one, snapshot([E('e1'), PD('pd1')]), options()]],
    ['small pictures are not worth the way', 'hybrid pd1: small items', [small, snapshot([E('e1'), PD('pd1', { vision: 'full' })]), options()]],
    ['one large picture among small ones is', 'e-pd pd1: 2 items on 1 encoder', [{ model: 'm', media: [item('a', 10), item('b', 257, 1)] }, snapshot([E('e1'), PD('pd1', { vision: 'full' })]), options()]],
    ['small pictures need a node that sees', 'e-pd pd1: 2 items on 1 encoder', [small, snapshot([E('e1'), PD('pd1')]), options()]],
    ['bypass never means never for small ones', 'e-pd pd1: 2 items on 1 encoder', [small, snapshot([E('e1'), PD('pd1', { vision: 'full' })]), never]],
    ['saturated encoders are bypassed', 'hybrid pd1: encoders saturated', [one, snapshot([E('e1', { tokens: 16_384 }), PD('pd1', { vision: 'full' })]), options()]],
    ['but not when bypass is never', 'e-pd pd1: 1 item on 1 encoder', [one, snapshot([E('e1', { tokens: 16_384 }), PD('pd1', { vision: 'full' })]), never]],
    ['no encoder at all', 'hybrid pd1: no encoder', [one, snapshot([PD('pd1', { vision: 'full' })]), never]],
    ['no healthy encoder', 'hybrid pd1: no healthy encoder', [one, snapshot([E('e1', { state: 'unhealthy' }), PD('pd1', { vision: 'full' })]), never]],
    ['an encoder whose breaker is open', 'e-pd pd1: 1 item on 1 encoder', [one, snapshot([E('e1', { broken: 'encode' }), E('e2'), PD('pd1', { vision: 'full' })]), never]],
    ['the last encoder, whatever its breaker says', 'e-pd pd1: 1 item on 1 encoder', [one, snapshot([E('e1', { broken: 'encode' }), PD('pd1', { vision: 'full' })]), never]],
    ['the last healthy node, whatever its breaker says', 'pd pd2: text only', [text, snapshot([PD('pd1', { state: 'unhealthy' }), PD('pd2', { broken: 'decode' })]), options()]],
    ['breakers leave less than half: all are asked', 'pd pd1: text only', [text, snapshot([PD('pd1', { broken: 'decode' }), PD('pd2', { broken: 'decode' }), PD('pd3', { requests: 1 })]), options()]],
    ['unless the threshold is lower', 'pd pd3: text only', [text, snapshot([PD('pd1', { broken: 'decode' }), PD('pd2', { broken: 'decode' }), PD('pd3', { requests: 1 })]), { ...options(), routing: { ...options().routing, panicThreshold: 20 } }]],
    ['no encoder and no node with vision', 'EPD_ERR_NO_ENCODER: no encoder', [one, snapshot([PD('pd1')]), options()]],
    ['an encoder of another processor', 'EPD_ERR_NO_ENCODER: no encoder fits the node', [one, snapshot([E('e1', { fingerprint: 'x' }), PD('pd1', { fingerprint: 'y' })]), options()]],
    ['formats that do not meet', 'hybrid pd1: no encoder fits the node', [one, snapshot([E('e1'), PD('pd1', { vision: 'full', accepts: [] })]), options()]],
    ['a refused link', 'hybrid pd1: no encoder fits the node', [one, snapshot([E('e1'), PD('pd1', { vision: 'full' })], { 'e1>pd1': 'refused' }), options()]],
    ['a node that encoders can feed is preferred', 'e-pd pd2: 1 item on 1 encoder', [one, snapshot([E('e1'), PD('pd1', { accepts: [] }), PD('pd2', { requests: 9 })]), options()]],
    ['who is linked comes before who is being linked', 'e-pd pd2: 1 item on 1 encoder', [one, snapshot([E('e1'), PD('pd1'), PD('pd2', { requests: 9 })], { 'e1>pd1': 'linking' }), options()]],
    ['a failed link is tried when there is no other', 'e-pd pd1: 1 item on 1 encoder', [one, snapshot([E('e1'), PD('pd1')], { 'e1>pd1': 'failed' }), options()]],
    ['encoders of another model do not count', 'EPD_ERR_NO_ENCODER: no encoder', [one, snapshot([E('e1', { models: ['x'] }), PD('pd1')]), options()]]
  ]
  for (const [name, expected, args] of rows) t.equal(brief(planRequest(...args)), expected, name)
})

t.test('each situation with prefill and decode nodes has its plan and its reason', async t => {
  const long = { ...text, promptTokens: 1_024 }
  const short = { ...text, promptTokens: 1_023 }
  const many = { ...long, singleNode: { what: 'n greater than 1', param: 'n', source: 'request' as const } }
  const tried = { ...long, singleNode: { what: 'not to be shared', source: 'attempt' as const } }
  const picture = { ...one, promptTokens: 2_000 }
  const with_ = (disaggregate: PlanOptions['routing']['disaggregate'], more: Partial<PlanOptions> = {}): PlanOptions => options({ ...more, routing: { ...options().routing, disaggregate } })
  const never = options({ bypass: 'never' })
  const pd = [P('p1'), D('d1')]
  const rows: Array<[string, string, Parameters<typeof planRequest>]> = [
    ['without hybrids always disaggregated', 'p-d p1>d1: no node does both', [short, snapshot(pd), options()]],
    ['without a healthy hybrid, too', 'p-d p1>d1: no healthy node does both', [short, snapshot([...pd, PD('pd1', { state: 'unhealthy' })]), options()]],
    ['a long prompt is disaggregated', 'p-d p1>d1: long prompt', [long, snapshot([...pd, PD('pd1')]), options()]],
    ['a short one does not', 'pd pd1: text only, short prompt', [short, snapshot([...pd, PD('pd1')]), options()]],
    ['unless always', 'p-d p1>d1: always', [short, snapshot([...pd, PD('pd1')]), with_('always')]],
    ['never', 'pd pd1: text only, disaggregation is off', [long, snapshot([...pd, PD('pd1')]), with_('never')]],
    ['never, and no hybrid', 'EPD_ERR_NO_NODE: disaggregation is off, and no node does both prefill and decode', [long, snapshot(pd), with_('never')]],
    ['never, and no healthy hybrid', 'EPD_ERR_NO_NODE: none of 1 nodes that do both is healthy', [long, snapshot([...pd, PD('pd1', { state: 'unhealthy' })]), with_('never')]],

    ['no P', 'pd pd1: text only, no prefill node', [long, snapshot([D('d1'), PD('pd1')]), options()]],
    ['no D', 'pd pd1: text only, no decode node', [long, snapshot([P('p1'), PD('pd1')]), options()]],
    ['no healthy P', 'pd pd1: text only, no healthy prefill node', [long, snapshot([P('p1', { state: 'unhealthy' }), D('d1'), PD('pd1')]), options()]],
    ['a P whose breaker is open', 'p-d p2>d1: long prompt', [long, snapshot([P('p1', { broken: 'prefill' }), P('p2', { requests: 9, tokens: 9 }), D('d1'), PD('pd1')]), options()]],
    ['a D whose breaker is open', 'p-d p1>d2: long prompt', [long, snapshot([P('p1'), D('d1', { broken: 'decode' }), D('d2', { requests: 9 }), PD('pd1')]), options()]],
    ['the last P and D, whatever their breakers say', 'p-d p1>d1: long prompt', [long, snapshot([P('p1', { broken: 'prefill' }), D('d1', { broken: 'decode' }), PD('pd1')]), options()]],
    ['formats that do not meet', 'pd pd1: text only, no decode node fits a prefill node', [long, snapshot([P('p1'), D('d1', { accepts: ['kv:fake/2'] }), PD('pd1')]), options()]],
    ['another model', 'pd pd1: text only, no decode node fits a prefill node', [long, snapshot([P('p1', { fingerprint: 'x' }), D('d1', { fingerprint: 'y' }), PD('pd1')]), options()]],
    ['a refused link', 'EPD_ERR_NO_NODE: no decode node fits a prefill node', [long, snapshot(pd, { 'p1>d1': 'refused' }), options()]],
    ['P and D of another model name do not count', 'EPD_ERR_NO_NODE: no decode node', [long, snapshot([P('p1'), D('d1', { models: ['x'] })]), options()]],
    ['only P: a model that is meant to be here', 'EPD_ERR_NO_NODE: no decode node', [long, snapshot([P('p1')]), options()]],

    ['P and D by tokens', 'p-d p2>d2: no node does both', [long, snapshot([P('p1', { tokens: 9_000 }), P('p2', { requests: 5, tokens: 100 }), D('d1', { requests: 3 }), D('d2', { requests: 1 })]), options()]],
    ['equal tokens: fewer requests', 'p-d p2>d1: no node does both', [long, snapshot([P('p1', { requests: 2 }), P('p2', { requests: 1 }), D('d1')]), options()]],
    ['the pair must work together', 'p-d p1>d1: no node does both', [long, snapshot([P('p1', { fingerprint: 'x', tokens: 9 }), P('p2', { fingerprint: 'y' }), D('d1', { fingerprint: 'x' }), D('d2', { fingerprint: 'z' })]), options()]],
    ['who is linked comes first', 'p-d p2>d2: no node does both', [long, snapshot([P('p1'), P('p2', { tokens: 9 }), D('d1'), D('d2', { requests: 9 })], { 'p1>d1': 'linking', 'p1>d2': 'linking', 'p2>d1': 'failed' }), options()]],
    ['a failed link is tried when there is no other', 'p-d p1>d1: no node does both', [long, snapshot(pd, { 'p1>d1': 'failed' }), options()]],

    ['a D that failed is avoided', 'p-d p1>d2: no node does both', [long, snapshot([...pd, D('d2', { requests: 9 })]), options(), new Set(['d1'])]],
    ['a P that failed is avoided', 'p-d p2>d1: no node does both', [long, snapshot([...pd, P('p2', { tokens: 9_000 })]), options(), new Set(['p1'])]],
    ['and a P whose only D has failed', 'p-d p2>d2: no node does both', [long, snapshot([...pd, P('p2', { tokens: 9_000 }), D('d2')], { 'p1>d2': 'refused' }), options(), new Set(['d1'])]],
    ['a hybrid comes before a pair that failed', 'pd pd1: text only, long prompt', [long, snapshot([...pd, PD('pd1')]), options(), new Set(['d1'])]],
    ['and a pair before a hybrid that failed', 'p-d p1>d1: short prompt', [short, snapshot([...pd, PD('pd1')]), options(), new Set(['pd1'])]],
    ['what failed is taken when there is nothing else', 'p-d p1>d1: no node does both', [long, snapshot(pd), options(), new Set(['p1', 'd1'])]],

    ['what can\'t be shared', 'pd pd1: text only, n greater than 1', [many, snapshot([...pd, PD('pd1')]), with_('always')]],
    ['no hybrid', 'EPD_ERR_NO_HYBRID (n): n greater than 1', [many, snapshot(pd), options()]],
    ['no healthy hybrid', 'EPD_ERR_NO_NODE: none of 1 nodes that do both is healthy', [many, snapshot([...pd, PD('pd1', { state: 'draining' })]), options()]],
    ['not even a D that can do without P', 'EPD_ERR_NO_HYBRID (n): n greater than 1', [many, snapshot([P('p1'), D('d1', { standalone: true })]), options()]],
    ['found out by trying', 'pd d1: text only, not to be shared', [tried, snapshot([P('p1'), D('d1', { standalone: true })]), options()]],
    ['found out by trying, and no hybrid', 'EPD_ERR_NO_NODE: not to be shared, and no node does both', [tried, snapshot(pd), options()]],
    ['all P are ill, and D can do without', 'pd d1: text only, no healthy prefill node', [long, snapshot([P('p1', { state: 'unhealthy' }), D('d1', { standalone: true })]), options()]],
    ['too long a prompt for one P', 'p-d p2>d1: no node does both', [long, snapshot([P('p1', { maxPrefillTokens: 1_535 }), P('p2', { tokens: 9_000 }), D('d1')]), options()]],
    ['with a margin, as it is estimated', 'p-d p1>d1: no node does both', [long, snapshot([P('p1', { maxPrefillTokens: 1_536 }), D('d1')]), options()]],
    ['too long for all', 'pd pd1: text only, prompt too long for the prefill nodes', [long, snapshot([P('p1', { maxPrefillTokens: 1_000 }), D('d1'), PD('pd1')]), options()]],
    ['too long for all, and no hybrid', 'EPD_ERR_NO_HYBRID: a prompt this long', [long, snapshot([P('p1', { maxPrefillTokens: 1_000 }), D('d1')]), options()]],

    ['a picture goes E, P, D', 'e-p-d p1>d1: 1 item on 1 encoder, no node does both', [picture, snapshot([E('e1'), ...pd]), options()]],
    ['P encodes small ones itself', 'p-d p1>d1: small items, no node does both', [{ ...small, promptTokens: 300 }, snapshot([E('e1'), P('p1', { vision: 'full' }), D('d1')]), options()]],
    ['but not when bypass is never', 'e-p-d p1>d1: 2 items on 1 encoder, no node does both', [{ ...small, promptTokens: 300 }, snapshot([E('e1'), P('p1', { vision: 'full' }), D('d1')]), never]],
    ['P encodes when there is no encoder', 'p-d p1>d1: no encoder, no node does both', [picture, snapshot([P('p1', { vision: 'full' }), D('d1')]), never]],
    ['or none is healthy', 'p-d p1>d1: no healthy encoder, long prompt', [picture, snapshot([E('e1', { state: 'unhealthy' }), P('p1', { vision: 'full' }), D('d1'), PD('pd1')]), never]],
    ['a blind P leaves it to a hybrid', 'hybrid pd1: no encoder, long prompt', [picture, snapshot([...pd, PD('pd1', { vision: 'full' })]), never]],
    ['no node with vision', 'EPD_ERR_NO_ENCODER: no encoder', [picture, snapshot([...pd, PD('pd1')]), never]],
    ['a blind hybrid leaves it to P', 'p-d p1>d1: no encoder, short prompt', [{ ...picture, promptTokens: 5 }, snapshot([P('p1', { vision: 'full' }), D('d1'), PD('pd1')]), never]],
    ['the P that encoders can feed', 'e-p-d p2>d1: 1 item on 1 encoder, no node does both', [picture, snapshot([E('e1'), P('p1'), P('p2', { tokens: 9_000 }), D('d1')], { 'e1>p1': 'refused' }), options()]],
    ['a D alone takes no pictures', 'EPD_ERR_NO_NODE: not to be shared, and no node does both', [{ ...picture, singleNode: tried.singleNode }, snapshot([E('e1'), P('p1'), D('d1', { standalone: true })]), options()]]
  ]
  for (const [name, expected, args] of rows) t.equal(brief(planRequest(...args)), expected, name)
  t.equal(plan(picture, snapshot([E('e1'), P('p1', { vision: 'full' }), D('d1')]), never).fallback, true)
  t.equal(plan(picture, snapshot([E('e1'), ...pd]), never).fallback, false)
})

t.test('planning the same request again gives the same plan', async t => {
  const nodes = snapshot([E('e1'), E('e2'), E('e3'), PD('pd1')])
  const media = pictures(...Array.from({ length: 20 }, (_, i) => `key ${i}`))
  const first = plan({ model: 'm', media }, nodes, options()).order.map(order => order.map(encoder => encoder.id))
  t.same(plan({ model: 'm', media }, nodes, options()).order.map(order => order.map(encoder => encoder.id)), first)
  t.ok(new Set(first.map(order => order[0])).size === 3, 'all encoders have a share')
  t.ok(first.every(order => new Set(order).size === 3), 'every encoder is in every order, once')
})

t.test('rendezvous hashing spreads keys evenly and moves only the share of the encoder that comes or goes', async t => {
  const nodes = ['http://10.0.0.1:23333', 'http://10.0.0.2:23333', 'http://10.0.0.3:23333', 'http://10.0.0.4:23333'].map(id => ({ id }))
  const keys = Array.from({ length: 4_000 }, (_, i) => `${i}`.padStart(64, '0'))
  const before = keys.map(key => rank(key, nodes)[0]!.id)
  for (const { id } of nodes) {
    const share = before.filter(one => one === id).length
    t.ok(share > 850 && share < 1_150, `${id} has about a quarter: ${share}`)
  }
  const after = keys.map(key => rank(key, nodes.slice(0, 3))[0]!.id)
  t.ok(before.every((id, i) => id === nodes[3]!.id || id === after[i]), 'only keys of the one that left have moved')
  t.ok(before.every((id, i) => id !== nodes[3]!.id || after[i] === rank(keys[i]!, nodes)[1]!.id), 'each to the second in its order')
})

t.test('a picture stays with its encoder under load, until that one is overloaded', async t => {
  const first = plan(one, snapshot([E('e1'), E('e2'), PD('pd1')]), options()).order[0]![0]!.id
  const other = first === 'e1' ? 'e2' : 'e1'
  const loaded = (tokens: number) => plan(one, snapshot([E(first, { tokens }), E(other), PD('pd1')]), options()).order[0]!.map(encoder => encoder.id)
  t.same(loaded(10_000), [first, other], 'affinity wins below the bound')
  t.same(loaded(16_000), [other, first], 'above it the picture spills over')
  const both = plan(one, snapshot([E(first, { tokens: 20_000 }), E(other, { tokens: 20_000 }), PD('pd1')]), options()).order[0]!
  t.equal(both[0]!.id, first, 'when all are equally loaded none is overloaded')
})

t.test('the items of one request count as load too', async t => {
  const media = Array.from({ length: 12 }, (_, i) => item('the same picture', 3_000, i))
  const { order, reason } = plan({ model: 'm', media }, snapshot([E('e1'), E('e2'), E('e3'), PD('pd1')]), options())
  t.equal(reason, '12 items on 3 encoders')
  for (const id of ['e1', 'e2', 'e3']) t.ok(order.filter(encoders => encoders[0]!.id === id).length <= 6)
})

t.test('encoders that are linked come before those whose handshake is under way', async t => {
  for (const key of ['a', 'b', 'c', 'd']) {
    const found = plan({ model: 'm', media: pictures(key) }, snapshot([E('e1'), E('e2'), PD('pd1')], { 'e1>pd1': 'linking' }), options())
    t.strictSame(found.order[0]!.map(node => node.id), ['e2'])
  }
})

t.test('an encoder that has failed this request comes last', async t => {
  const nodes = snapshot([E('e1'), E('e2'), PD('pd1')])
  const first = plan(one, nodes, options()).order[0]![0]!.id
  t.not(plan(one, nodes, options(), new Set([first])).order[0]![0]!.id, first)
})

t.test('fallback says whether the language model could encode by itself', async t => {
  t.equal(plan(one, snapshot([E('e1'), PD('pd1', { vision: 'full' })]), options()).fallback, true)
  t.equal(plan(one, snapshot([E('e1'), PD('pd1')]), options()).fallback, false)
})

t.test('vision work is shared with a language model that can take its part, by queues and measured rates', async t => {
  const shared = (sketches: readonly Sketch[], rates: Record<string, number | undefined>, mixes = true): RegistrySnapshot => {
    const plain = snapshot(sketches)
    const pd = plain.nodes.find(one => one.role === 'hybrid')!.id
    const link = (from: string): LinkView => ({ from, to: pd, state: 'linked', link: { from, to: pd, transport: 'raw', mixes, epochs: [undefined, undefined] } })
    const nodes = plain.nodes.map(one => ({ ...one, load: { ...one.load, rate: rates[one.id] }, links: new Map(one.role === 'encoder' ? [[pd, link(one.id)]] : []) }))
    return { ...plain, nodes, byId: new Map(nodes.map(one => [one.id, one])) }
  }
  const four = { model: 'm', media: pictures('a', 'b', 'c', 'd') }
  const on = (plan: Plan | Refusal): string[] => 'refused' in plan ? [] : plan.order.map(([first]) => first?.id ?? 'self')
  const rates = { e: 5_000, pd: 5_000 }
  t.match(planRequest(four, shared([E('e'), PD('pd', { vision: 'full' })], rates), options()), { topology: 'e-pd', reason: '4 items on 1 encoder' }, 'an idle encoder takes all')
  const busy = planRequest(four, shared([E('e', { tokens: 3_000 }), PD('pd', { vision: 'full' })], rates), options())
  t.match(busy, { topology: 'e-pd', reason: '2 items on 1 encoder, 2 on the language model' })
  t.same(on(busy), ['self', 'self', 'e', 'e'])
  t.match(planRequest(four, shared([E('e', { tokens: 9_000 }), PD('pd', { vision: 'full' })], rates), options()), { topology: 'hybrid', reason: 'encoders busy', order: [] })
  t.match(planRequest({ ...four, has: (_node, item) => item.routeKey !== 'b' }, shared([E('e', { tokens: 3_000 }), PD('pd', { vision: 'full' })], rates), options()), { reason: '3 items on 1 encoder, 1 on the language model' }, 'what an encoder has costs it nothing')
  const all = '4 items on 1 encoder'
  t.match(planRequest(four, shared([E('e', { tokens: 3_000 }), PD('pd', { vision: 'full' })], { e: 5_000, pd: 500 }), options()), { reason: all }, 'a slow language model takes none')
  t.match(planRequest(four, shared([E('e', { tokens: 3_000 }), PD('pd', { vision: 'full', requests: 3 })], rates), options()), { reason: all }, 'nor one that generates')
  t.match(planRequest(four, shared([E('e', { tokens: 3_000 }), PD('pd', { vision: 'full', tokens: 3_000 })], rates), options()), { reason: all }, 'nor one with a queue of its own')
  t.match(planRequest(four, shared([E('e', { tokens: 3_000 }), PD('pd')], rates), options()), { reason: all }, 'nor one without vision weights')
  t.match(planRequest(four, shared([E('e', { tokens: 3_000 }), PD('pd', { vision: 'full' })], rates, false), options()), { reason: all }, 'nor one that takes no mixed requests')
  t.match(planRequest(four, shared([E('e', { tokens: 3_000 }), PD('pd', { vision: 'full' })], {}), options()), { reason: all }, 'before the first measurement')
  t.match(planRequest(four, shared([E('e', { tokens: 3_000 }), PD('pd', { vision: 'full' })], rates), options({ bypass: 'never' })), { reason: all }, 'nor where the language model must not encode')
})
