/** What the planner remembers of a snapshot's nodes, and what it leaves unsorted, changes no plan. */
import t from 'tap'
import type { MediaItem, NodeInfo, Role, Stage } from '../../adapters/adapter.ts'
import { planRequest, rank, type Plan, type PlanOptions, type Policy, type Refusal, type RequestView } from '../../plugin/planning/index.ts'
import type { BreakerState, LinkState, NodeLoad, NodeSnapshot, RegistrySnapshot } from '../../plugin/registry/index.ts'
import { fakeAdapter } from '../helper/fake-node.ts'
import { seeded } from '../helper/random.ts'

type Below = (limit: number) => number
type Live = { -readonly [name in keyof NodeLoad]: NodeLoad[name] }

/** A fleet whose loads and breakers can be changed in place, as those of a registry do. */
interface Fleet {
  readonly snapshot: RegistrySnapshot
  change (): void
  /** The same at this moment, of new objects: nothing is known of them. */
  copy (): RegistrySnapshot
}

const MODELS = ['m', 'n']
const LINKS: readonly LinkState[] = ['linked', 'linked', 'linking', 'failed', 'refused', 'none']
const FORMATS: Readonly<Record<Role, readonly [produces: string[], accepts: string[]]>> = { encoder: [['features:fake/1'], []], hybrid: [[], ['features:fake/1']], prefill: [['kv:fake/1'], ['features:fake/1']], decode: [[], ['kv:fake/1']] }

function fleet (below: Below): Fleet {
  const pick = <T>(...of: readonly T[]): T => of[below(of.length)]!
  const roles = pick<Role[]>(['encoder', 'hybrid'], ['encoder', 'prefill', 'decode'], ['encoder', 'hybrid', 'prefill', 'decode'])
  const states: Record<string, LinkState> = {}
  const live = Array.from({ length: 3 + below(20) }, (_, i) => {
    const role = pick(...roles)
    const info: NodeInfo = { status: 'healthy', models: MODELS, role, backend: 'fake', produces: FORMATS[role][0], accepts: FORMATS[role][1], vision: pick('full', 'features'), fingerprint: below(9) === 0 ? 'other' : undefined, maxPrefillTokens: pick(undefined, 1_500), standalone: below(4) === 0, cards: [] }
    const load: Live = { requests: 0, tokens: 0, work: 0, usedAt: i, failing: false }
    const breakers: Record<Stage, BreakerState> = { encode: 'closed', prefill: 'closed', decode: 'closed' }
    const node: NodeSnapshot = { id: `http://10.0.0.${i}:8000`, url: '', role, models: pick(['m'], ['n', 'm'], MODELS), state: below(8) === 0 ? 'unhealthy' : 'healthy', adapter: fakeAdapter, info, speed: pick(1, 2), checkMedia: false, notes: [], load, breakers, links: new Map() }
    return { node, load, breakers }
  })
  const all = below(2) === 0
  const state = (from: string, to: string): LinkState => (states[`${from}>${to}`] ??= all ? 'linked' : pick(...LINKS))
  const of = (nodes: readonly NodeSnapshot[]): RegistrySnapshot => ({ version: 1, nodes, byId: new Map(nodes.map(node => [node.id, node])), models: MODELS, link: (from, to) => state(from, to) })
  return {
    snapshot: of(live.map(({ node }) => node)),
    change: () => {
      for (const { load, breakers } of live) {
        Object.assign(load, { requests: below(4), tokens: below(20_000), work: below(5) * 2_000, failing: below(6) === 0 })
        for (const stage of ['encode', 'prefill', 'decode'] as const) breakers[stage] = pick<BreakerState>('closed', 'closed', 'half-open', 'open')
      }
    },
    copy: () => of(live.map(({ node, load, breakers }) => ({ ...node, load: { ...load }, breakers: { ...breakers } })))
  }
}

function request (below: Below): RequestView {
  const media = Array.from({ length: below(4) }, (_, index): MediaItem => ({ index, message: 0, part: index, path: '', modality: 'image', type: 'image_url', url: { start: 0, end: 0 }, span: { start: 0, end: 0 }, routeKey: String(below(1_000)), remote: false, tokens: 1_000 }))
  const key = `conversation ${below(1_000)}`
  return { model: MODELS[below(2)]!, media, promptTokens: [10, 500, 2_000][below(3)]!, conversation: () => key }
}

function options (policy: PlanOptions['routing']['policy'], below: Below): PlanOptions {
  return { bypass: below(2) === 0 ? 'auto' : 'never', routing: { policy, nodeTokens: 4_096, encoderTokens: 8_192, smallItem: 256, disaggregate: 'auto', disaggregateTokens: 1_024, panicThreshold: 50 } }
}

function names (plan: Plan | Refusal): unknown {
  return 'refused' in plan ? plan : { ...plan, prefill: plan.prefill?.id, node: plan.node.id, order: plan.order.map(nodes => nodes.map(({ id }) => id)) }
}

t.test('plans follow loads, breakers and failures although nodes and links are the same', async t => {
  for (let seed = 1; seed <= 150; seed++) {
    const below = seeded(seed)
    const { snapshot, change, copy } = fleet(below)
    const settings = options((['prefix', 'least-tokens'] as const)[below(2)]!, below)
    for (let i = 0; i < 20; i++) {
      change()
      const one = request(below)
      const avoid = new Set(snapshot.nodes.filter(() => below(6) === 0).map(({ id }) => id))
      const planned = names(planRequest(one, snapshot, settings, avoid))
      const fresh = names(planRequest(one, copy(), settings, avoid))
      if (JSON.stringify(planned) !== JSON.stringify(fresh)) t.same(planned, fresh, `seed ${seed}, plan ${i}`)
    }
  }
  t.pass('3,000 plans')
})

t.test('the node that is chosen is the first of all, sorted', async t => {
  /** In the order of `least-tokens` when it is asked. */
  const sorted: Record<string, Policy> = {
    'least-tokens': candidates => candidates,
    prefix: (candidates, { stage, promptTokens = 0, conversation }) => {
      const key = conversation?.('prefix')
      if (stage === 'encode' || promptTokens < 64 || key === undefined) return candidates
      // The bound holds against the nodes that are not in doubt, which a function is not told: here none is.
      const work = promptTokens + 256
      const total = candidates.reduce((sum, { load }) => sum + load.work, work)
      const bound = Math.max(4_096, 1.25 * total / candidates.reduce((sum, { speed }) => sum + speed, 0))
      const over = ({ load, speed }: NodeSnapshot): boolean => load.work + work > bound * speed
      const order = rank(key, candidates)
      return [...order.filter(node => !over(node)), ...order.filter(over)]
    }
  }
  const counts = { 'least-tokens': 0, prefix: 0 }
  for (let seed = 1; seed <= 300; seed++) {
    const below = seeded(seed)
    const { snapshot, change, copy } = fleet(below)
    for (const name of ['least-tokens', 'prefix'] as const) {
      change()
      const doubtful = name === 'prefix' ? copy().nodes.map(node => ({ ...node, load: { ...node.load, failing: false } })) : copy().nodes
      const on = { ...snapshot, nodes: doubtful }
      const avoid = new Set(name === 'prefix' ? [] : snapshot.nodes.filter(() => below(6) === 0).map(({ id }) => id))
      const one = request(below)
      const settings = options(name, below)
      const [chosen, reference] = [planRequest(one, on, settings, avoid), planRequest(one, on, { ...settings, routing: { ...settings.routing, policy: sorted[name]! } }, avoid)]
      if (!('refused' in chosen)) counts[name]++
      if (JSON.stringify(names(chosen)) !== JSON.stringify(names(reference))) t.same(names(chosen), names(reference), `${name}, seed ${seed}`)
    }
  }
  t.ok(counts['least-tokens'] > 100 && counts.prefix > 100, 'most requests found nodes')
})
