/** What a plan costs with many nodes, and what comparing all of them is worth against two by chance. */
import { createHash } from 'node:crypto'
import type { MediaItem, NodeInfo, Role } from '../../adapters/adapter.ts'
import { byLoad, planRequest, type PlanOptions, type RequestView } from '../../plugin/planning/index.ts'
import type { NodeSnapshot, RegistrySnapshot } from '../../plugin/registry/index.ts'
import { fakeAdapter } from '../helper/fake-node.ts'
import { seeded } from '../helper/random.ts'
import { median, quantile, table, type BenchContext } from './report.ts'

export const name = 'planner'

const SIZES = [10, 100, 1_000]
const OPTIONS: PlanOptions = { bypass: 'never', routing: { policy: 'least-tokens', nodeTokens: 4_096, encoderTokens: 16_384, smallItem: 256, disaggregate: 'auto', disaggregateTokens: 1_024, panicThreshold: 50 } }
const TEXT: RequestView = { model: 'm', media: [], promptTokens: 200 }
const KEY = createHash('sha256').update('a').digest('hex')
const PICTURE: MediaItem = { index: 0, message: 0, part: 0, path: 'messages[0].content[0]', modality: 'image', type: 'image_url', url: { start: 0, end: 0 }, span: { start: 0, end: 0 }, routeKey: KEY, remote: false, tokens: 1_000 }

/** A quarter are encoders. */
function snapshot (count: number): RegistrySnapshot {
  const below = seeded(count)
  const node = (i: number): NodeSnapshot => {
    const role: Role = i % 4 === 0 ? 'encoder' : 'hybrid'
    const info: NodeInfo = { status: 'healthy', models: ['m'], role, backend: 'fake', produces: role === 'encoder' ? ['features:fake/1'] : [], accepts: role === 'encoder' ? [] : ['features:fake/1'], vision: role === 'encoder' ? 'full' : 'features' }
    return { id: `http://10.0.${i >> 8}.${i & 255}:8000`, url: '', role, models: ['m'], state: 'healthy', adapter: fakeAdapter, info, speed: 1, checkMedia: false, notes: [], load: { requests: below(9), tokens: 0, work: below(9_000), usedAt: below(9_999) }, breakers: { encode: 'closed', prefill: 'closed', decode: 'closed' }, links: new Map() }
  }
  const nodes = Array.from({ length: count }, (_, i) => node(i))
  return { version: 1, nodes, byId: new Map(nodes.map(one => [one.id, one])), models: ['m'], link: () => 'linked' }
}

/** CPU of one call, in microseconds. */
function cost (work: () => unknown, seconds: number): number {
  const rounds = Array.from({ length: 5 }, () => {
    const until = performance.now() + seconds * 200
    const before = process.cpuUsage()
    let calls = 0
    do for (let i = 0; i < 50; i++, calls++) work(); while (performance.now() < until)
    const { user, system } = process.cpuUsage(before)
    return (user + system) / calls
  })
  return median(rounds)
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
    const nodes = snapshot(size)
    const models = nodes.nodes.filter(({ role }) => role === 'hybrid')
    const below = seeded(1)
    const two = (): NodeSnapshot => byLoad([models[below(models.length)]!, models[below(models.length)]!], 200)[0]!
    return [String(size), cost(() => planRequest(TEXT, nodes, OPTIONS), seconds), cost(() => byLoad(models, 200), seconds), cost(two, seconds), cost(() => planRequest({ ...TEXT, media: [PICTURE] }, nodes, OPTIONS), seconds)]
  })
  log('  waiting times')
  const times = [1, 4].flatMap(gateways => (['all', 'two'] as const).map(choice => {
    const found = waits(choice, gateways, 100, quick ? 40_000 : 200_000)
    return [`${gateways}, ${choice === 'all' ? 'all compared' : 'two by chance'}`, found.reduce((sum, one) => sum + one, 0) / found.length, quantile(found, 0.99)]
  }))
  return [
    '## Planner', '',
    'CPU of a plan in microseconds, by the number of nodes of a model; a quarter of them are encoders. "Of it, all compared" is the order of language models by tokens in flight, which choosing the better of two by chance would take the place of.', '',
    table(['nodes', 'text', 'of it, all compared', 'two by chance', 'one picture'], costs), '',
    'Waiting time before 100 simulated nodes that are busy for nine tenths of the time, in mean service times. Each gateway knows what is in flight through itself only.', '',
    table(['gateways', 'mean', 'p99'], times)
  ].join('\n')
}
