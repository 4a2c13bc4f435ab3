/** What a plan costs with many nodes, and what comparing all language models is worth against the better of two by chance. */
import { createHash } from 'node:crypto'
import type { MediaItem, NodeInfo, Role } from '../../adapters/adapter.ts'
import { planRequest, type PlanOptions, type RequestView } from '../../plugin/planning/index.ts'
import type { NodeSnapshot, RegistrySnapshot } from '../../plugin/registry/index.ts'
import { Load, StageBreakers } from '../../plugin/registry/load.ts'
import { fakeAdapter } from '../helper/fake-node.ts'
import { seeded } from '../helper/random.ts'
import { quantile, table, type BenchContext } from './report.ts'

export const name = 'planner'

const SIZES = [10, 100, 1_000]
const OPTIONS: PlanOptions = { bypass: 'never', routing: { policy: 'least-tokens', nodeTokens: 4_096, encoderTokens: 16_384, smallItem: 256, disaggregate: 'auto', disaggregateTokens: 1_024, panicThreshold: 50 } }
const PREFIX: PlanOptions = { ...OPTIONS, routing: { ...OPTIONS.routing, policy: 'prefix' } }
/** Of conversations that are new each time. */
let conversations = 0
const TEXT: RequestView = { model: 'm', media: [], promptTokens: 200, conversation: () => String(conversations++) }
const PICTURES = (count: number): RequestView => ({ ...TEXT, media: Array.from({ length: count }, (_, index) => picture(index)) })

function picture (index: number): MediaItem {
  return { index, message: 0, part: index, path: `messages[0].content[${index}]`, modality: 'image', type: 'image_url', url: { start: 0, end: 0 }, span: { start: 0, end: 0 }, routeKey: createHash('sha256').update(String(index)).digest('hex'), remote: false, tokens: 1_000 }
}

/** A quarter are encoders; with `split`, another one prefills and the rest decode. */
function snapshot (count: number, split = false): RegistrySnapshot {
  const below = seeded(count)
  const node = (i: number): NodeSnapshot => {
    const role: Role = i % 4 === 0 ? 'encoder' : !split ? 'hybrid' : i % 4 === 1 ? 'prefill' : 'decode'
    const info: NodeInfo = { status: 'healthy', models: ['m'], role, backend: 'fake', produces: role === 'encoder' ? ['features:fake/1'] : role === 'prefill' ? ['kv:fake/1'] : [], accepts: role === 'decode' ? ['kv:fake/1'] : ['features:fake/1'], vision: role === 'encoder' ? 'full' : 'features' }
    const load = new Load()
    load.reserve(0, below(9_000))
    return { id: `http://10.0.${i >> 8}.${i & 255}:8000`, url: '', role, models: ['m'], state: 'healthy', adapter: fakeAdapter, info, speed: 1, checkMedia: false, notes: [], load, breakers: new StageBreakers(5, 10_000), links: new Map() }
  }
  const nodes = Array.from({ length: count }, (_, i) => node(i))
  return { version: 1, nodes, byId: new Map(nodes.map(one => [one.id, one])), models: ['m'], link: () => 'linked' }
}

/** CPU of one call, in microseconds: the least of many short rounds, because other work on the machine only adds to it. */
function cost (work: () => unknown, seconds: number): number {
  for (let i = 0; i < 1_000; i++) work()
  return Math.min(...Array.from({ length: 40 }, () => {
    const until = performance.now() + seconds * 25
    const before = process.cpuUsage()
    let calls = 0
    do for (let i = 0; i < 20; i++, calls++) work(); while (performance.now() < until)
    const { user, system } = process.cpuUsage(before)
    return (user + system) / calls
  }))
}

type Choice = 'all' | 'two'

/**
 * Requests of random length come to nodes that serve one after the other, nine tenths of what they can. Gateways know the
 * work of their own requests only. @returns waiting times, in mean service times
 */
function waits (choice: Choice, gateways: number, nodes: number, requests: number): number[] {
  const below = seeded(7)
  const random = (): number => (below(1e9) + 1) / (1e9 + 1)
  const freeAt = new Float64Array(nodes)
  /** Work that each gateway has at each node, and when which part of it ends. */
  const load = Array.from({ length: gateways }, () => new Float64Array(nodes))
  const ends = Array.from({ length: gateways }, () => Array.from({ length: nodes }, (): Array<readonly [at: number, work: number]> => []))
  const result: number[] = []
  let now = 0
  for (let i = 0; i < requests; i++) {
    now += -Math.log(random()) / (0.9 * nodes)
    const gateway = below(gateways)
    const known = (node: number): number => {
      const queue = ends[gateway]![node]!
      while (queue.length > 0 && queue[0]![0] <= now) load[gateway]![node]! -= queue.shift()![1]
      return load[gateway]![node]!
    }
    const first = below(nodes)
    let best = first
    if (choice === 'two') {
      const other = (first + 1 + below(nodes - 1)) % nodes
      if (known(other) < known(first)) best = other
    } else for (let at = 1; at < nodes; at++) if (known((first + at) % nodes) < known(best)) best = (first + at) % nodes
    const work = -Math.log(random())
    const begin = Math.max(now, freeAt[best]!)
    freeAt[best] = begin + work
    load[gateway]![best]! += work
    ends[gateway]![best]!.push([freeAt[best]!, work])
    if (i > requests / 10) result.push(begin - now)
  }
  return result
}

export async function run ({ quick, log }: BenchContext): Promise<string> {
  const seconds = quick ? 0.3 : 2
  const costs = SIZES.map(size => {
    log(`  ${size} nodes`)
    const [nodes, split] = [snapshot(size), snapshot(size, true)]
    const plan = (request: RequestView, on: RegistrySnapshot, options = OPTIONS): number => cost(() => planRequest(request, on, options), seconds)
    const fresh = cost(() => planRequest(PICTURES(1), { ...nodes, nodes: [...nodes.nodes], link: () => 'linked' }, PREFIX), seconds)
    return [String(size), plan(TEXT, nodes), plan(TEXT, nodes, PREFIX), plan(PICTURES(1), nodes, PREFIX), plan(PICTURES(4), nodes, PREFIX), plan({ ...TEXT, promptTokens: 2_000 }, split, PREFIX), fresh]
  })
  log('  waiting times')
  const times = [1, 4].flatMap(gateways => (['all', 'two'] as const).map(choice => {
    const found = waits(choice, gateways, 100, quick ? 40_000 : 200_000)
    return [`${gateways}, ${choice === 'all' ? 'all compared' : 'two by chance'}`, found.reduce((sum, one) => sum + one, 0) / found.length, quantile(found, 0.99)]
  }))
  return [
    '## Planner', '',
    'CPU of a plan in microseconds, the least of 40 rounds, by the number of nodes of a model: a quarter are encoders, the others language models; with P and D, a quarter prefill and half decode. "After a change": the first plan for one picture after a node or a link has changed.', '',
    table(['nodes', 'text, `least-tokens`', 'text, `prefix`', '1 picture', '4 pictures', 'long text, P and D', '1 picture, after a change'], costs), '',
    'Waiting time before 100 simulated nodes that are busy for nine tenths of the time, in mean service times. Each gateway knows what is in flight through itself only.', '',
    table(['gateways', 'mean', 'p99'], times)
  ].join('\n')
}
