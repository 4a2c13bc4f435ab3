/** Requests before nodes with caches, in simulated time: the planner's own functions choose, and nothing is sent. */
import type { MediaItem, NodeInfo } from '../../adapters/adapter.ts'
import { planRequest, type PlanOptions, type Policy, type RequestView } from '../../plugin/planning/index.ts'
import type { NodeLoad, NodeSnapshot, RegistrySnapshot } from '../../plugin/registry/index.ts'
import { fakeAdapter } from '../helper/fake-node.ts'
import { seeded } from '../helper/random.ts'

export interface Setting {
  /** `encode`: pictures over encoders. `decode`: turns of conversations over language models. */
  readonly stage: 'encode' | 'decode'
  readonly nodes: number
  readonly gateways: number
  readonly requests: number
  /** Pictures, or conversations, that there are. */
  readonly keys: number
  /** Exponent of their popularity: 0 for all alike, 1 for Zipf's law. */
  readonly zipf: number
  /** Share of what all nodes can do if nothing is found in a cache. */
  readonly load: number
  /** Pictures or conversations that a node keeps. */
  readonly cache: number
  /** What a request takes that is found in a cache, in the time of one that is not. */
  readonly hit: number
  /** Tokens that a node may have in flight before work spills over from it; a request has 1,000. 0: as by default. */
  readonly bound: number
  readonly seed: number
}

export interface Outcome {
  readonly policy: string
  /** Of the requests, the share found in a cache. */
  readonly hits: number
  /** From arrival to end, in the time of one request that is not found in a cache. */
  readonly p50: number
  readonly p99: number
  /** Work of the busiest node against the mean. */
  readonly imbalance: number
  /** Plans only, in microseconds of this machine. */
  readonly planUs: number
}

type Below = (limit: number) => number
type Live = { -readonly [name in keyof NodeLoad]: NodeLoad[name] }

const TOKENS = 1_000
const FORMAT = 'features:simulated/1'

/** The package's own policies by name, and what they are to be better than. */
function policiesOf (stage: Setting['stage'], below: Below): Readonly<Record<string, PlanOptions['routing']['policy']>> {
  const busy = ({ load }: NodeSnapshot): number => stage === 'encode' ? load.tokens : load.work
  const least = (tie: (node: NodeSnapshot) => number): Policy => candidates => [candidates.reduce((best, node) => busy(node) - busy(best) < 0 || (busy(node) === busy(best) && tie(node) < tie(best)) ? node : best)]
  const two: Policy = candidates => [candidates[below(candidates.length)]!, candidates[below(candidates.length)]!].sort((a, b) => busy(a) - busy(b))
  const random: Policy = candidates => [candidates[below(candidates.length)]!]
  return stage === 'encode' ? { affinity: 'prefix', 'least tokens, then hash': at('encode', least(() => 0)), 'least tokens': at('encode', least(({ load }) => load.usedAt)), 'two by chance': at('encode', two), random: at('encode', random) } : { prefix: 'prefix', 'least-tokens': 'least-tokens', 'two by chance': two, random }
}

function at (stage: string, policy: Policy): Policy {
  return (candidates, request) => request.stage === stage ? policy(candidates, request) : candidates
}

/** The nodes as one gateway sees them: it knows the work of its own requests only. */
function viewOf ({ stage, nodes: count }: Setting): { readonly snapshot: RegistrySnapshot, readonly loads: readonly Live[] } {
  const loads: Live[] = []
  const node = (i: number, role: 'encoder' | 'hybrid'): NodeSnapshot => {
    const load: Live = { requests: 0, tokens: 0, work: 0, usedAt: 0 }
    if (role === 'encoder' || stage === 'decode') loads.push(load)
    const info: NodeInfo = { status: 'healthy', models: ['m'], role, backend: 'simulated', produces: role === 'encoder' ? [FORMAT] : [], accepts: role === 'encoder' ? [] : [FORMAT], vision: 'features' }
    return { id: `http://10.${role === 'encoder' ? 0 : 1}.${i >> 8}.${i & 255}:8000`, url: '', role, models: ['m'], state: 'healthy', adapter: fakeAdapter, info, speed: 1, checkMedia: false, notes: [], load, breakers: { encode: 'closed', prefill: 'closed', decode: 'closed' }, links: new Map() }
  }
  const all = Array.from({ length: count }, (_, i) => node(i, stage === 'encode' ? 'encoder' : 'hybrid'))
  if (stage === 'encode') all.push(node(0, 'hybrid'))
  return { loads, snapshot: { version: 1, nodes: all, byId: new Map(all.map(one => [one.id, one])), models: ['m'], link: () => 'linked' } }
}

function requestOf (key: number, stage: Setting['stage']): RequestView {
  const picture: MediaItem = { index: 0, message: 0, part: 0, path: '', modality: 'image', type: 'image_url', url: { start: 0, end: 0 }, span: { start: 0, end: 0 }, routeKey: `key ${key}`, remote: false, tokens: TOKENS }
  return { model: 'm', media: stage === 'encode' ? [picture] : [], promptTokens: TOKENS, conversation: () => `key ${key}` }
}

/** Draws keys, popular ones often. */
function drawer ({ keys, zipf }: Setting, random: () => number): () => number {
  const sums = new Float64Array(keys)
  for (let i = 0, sum = 0; i < keys; i++) sums[i] = sum += (i + 1) ** -zipf
  return () => {
    const wanted = random() * sums[keys - 1]!
    let [low, high] = [0, keys - 1]
    while (low < high) {
      const middle = (low + high) >> 1
      if (sums[middle]! < wanted) low = middle + 1
      else high = middle
    }
    return low
  }
}

/** One simulated node: it serves one request after the other, and keeps what it was asked for last. */
class Server {
  readonly #cache = new Set<number>()
  /** Ends of its requests, and what follows; the first come first. */
  readonly #ends: Array<{ readonly at: number, end (): void }> = []
  freeAt = 0
  work = 0

  /** @returns whether it was found in the cache */
  serve (key: number, now: number, { cache, hit }: Setting, end: () => void): boolean {
    const found = this.#cache.delete(key)
    this.#cache.add(key)
    if (this.#cache.size > cache) this.#cache.delete(this.#cache.values().next().value!)
    const takes = found ? hit : 1
    this.freeAt = Math.max(now, this.freeAt) + takes
    this.work += takes
    this.#ends.push({ at: this.freeAt, end })
    return found
  }

  settle (now: number): void {
    while (this.#ends.length > 0 && this.#ends[0]!.at <= now) this.#ends.shift()!.end()
  }
}

function simulateOne (policy: string, setting: Setting): Outcome {
  const { stage, nodes, gateways, requests, load, bound, seed } = setting
  // Arrivals and keys are the same for each policy; what a policy draws by chance has a generator of its own.
  const below = seeded(seed)
  const random = (): number => (below(1e9) + 1) / (1e9 + 1)
  const draw = drawer(setting, random)
  const options: PlanOptions = { bypass: 'never', routing: { policy: policiesOf(stage, seeded(seed + 1))[policy]!, nodeTokens: bound === 0 ? 4_096 : bound, encoderTokens: bound === 0 ? 16_384 : bound, smallItem: 256, disaggregate: 'never', disaggregateTokens: 1_024, panicThreshold: 50 } }
  const views = Array.from({ length: gateways }, () => viewOf(setting))
  const servers = Array.from({ length: nodes }, () => new Server())
  const byId = new Map(views[0]!.snapshot.nodes.map(({ id }, i) => [id, i]))
  const latencies: number[] = []
  let [now, hits, planning, uses] = [0, 0, 0, 0]
  for (let i = 0; i < requests; i++) {
    now += -Math.log(random()) / (load * nodes)
    const { snapshot, loads } = views[below(gateways)]!
    const key = draw()
    for (const server of servers) server.settle(now)
    const before = performance.now()
    const plan = planRequest(requestOf(key, stage), snapshot, options)
    planning += performance.now() - before
    if ('refused' in plan) throw new Error(plan.reason)
    const chosen = byId.get((stage === 'encode' ? plan.order[0]![0]! : plan.node).id)!
    const own = loads[chosen]!
    own.requests++
    own.tokens += TOKENS
    own.work += TOKENS
    own.usedAt = ++uses
    const found = servers[chosen]!.serve(key, now, setting, () => {
      own.requests--
      own.tokens -= TOKENS
      own.work -= TOKENS
    })
    // Caches are empty at first.
    if (i < requests / 5) continue
    if (found) hits++
    latencies.push(servers[chosen]!.freeAt - now)
  }
  latencies.sort((a, b) => a - b)
  const quantile = (share: number): number => latencies[Math.min(latencies.length - 1, Math.floor(share * latencies.length))]!
  const work = servers.map(server => server.work)
  return { policy, hits: hits / latencies.length, p50: quantile(0.5), p99: quantile(0.99), imbalance: Math.max(...work) * nodes / work.reduce((sum, one) => sum + one, 0), planUs: planning * 1_000 / requests }
}

/** Each policy before the same requests. */
export function simulate (setting: Setting): Outcome[] {
  return Object.keys(policiesOf(setting.stage, seeded(1))).map(policy => simulateOne(policy, setting))
}
