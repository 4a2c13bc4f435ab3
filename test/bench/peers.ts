import { mkdtemp, rm } from 'node:fs/promises'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { chatOf } from './chat.ts'
import { KINDS, Router } from './peer-routers.ts'
import { Peer } from './processes.ts'
import { median, quantile, table } from './report.ts'
import type { BenchContext } from './report.ts'

export const name = 'peers'

const PATH = '/v1/chat/completions'
const CHUNKS = 20
const INTERVAL = 5
const ROUNDS = 3
/** Before a router is measured with a load, where its code is compiled when it is built. */
const WARM_UP_MS = 300
const TEXT = JSON.stringify({ model: 'm', messages: [{ role: 'user', content: 'y'.repeat(100) }], max_tokens: 200, temperature: 0 })

/**
 * `connections`: of each core that the router has. `compiling`: milliseconds of the load before a router is measured whose code
 * is compiled as it runs; a process of ours needs four times the CPU in its first seconds.
 */
const LOADS = [
  { label: 'Text, answers of 1 KB', connections: 64, compiling: 5_000, body: () => TEXT },
  { label: `Streams of ${CHUNKS} chunks, one each ${INTERVAL} ms`, connections: 256, compiling: 2_000, body: () => TEXT.replace('"model"', '"stream":true,"model"') },
  { label: '1 picture of 1 MiB', connections: 8, compiling: 2_000, body: () => chatOf(1, 1 << 20) },
  { label: '4 pictures of 1 MiB', connections: 4, compiling: 2_000, body: () => chatOf(4, 1 << 20) }
] as const

interface LoadResult { requests: number, failures: number, latencies: number[], elapsed: number }
interface Side { readonly label: string, readonly cores: number, readonly ports: readonly number[], readonly router?: Router, readonly compiles: boolean, readonly figures: Figures[] }
interface Figures { readonly rate: number, readonly cpu: number, readonly busy: number, readonly p50: number, readonly p99: number, readonly failures: number }

/** Requests per second of this gateway and of other routers on as many cores, with the same servers behind them. */
export async function run (context: BenchContext): Promise<string> {
  const all = availableParallelism()
  const half = Math.max(1, Math.floor(all / 2))
  const counts = context.workers ?? [1, 2, 4, 8].filter(count => count <= half)
  const seconds = context.seconds ?? (context.quick ? 0.6 : 2)
  const kinds = KINDS.filter(kind => kind.program !== undefined)
  const missing = KINDS.filter(kind => kind.program === undefined).map(kind => kind.missing)
  if (missing.length > 0) context.log(`  left out, because not installed: ${missing.join(', ')}`)

  const folder = await mkdtemp(join(tmpdir(), 'epd-peers-'))
  const others = all === 1 ? '0' : `${half}-${all - 1}`
  const each = Math.max(1, Math.floor((all - half) / 2))
  const start = (script: string): Peer[] => Array.from({ length: each }, () => new Peer(new URL(script, import.meta.url), [], others))
  const [backends, loads] = [start('./relay-upstream.js'), start('./relay-load.js')]
  const routers: Router[] = []
  try {
    const ports = await Promise.all(backends.map(async backend => await backend.call<number>('port')))
    await Promise.all(backends.map(async backend => { await backend.call('pace', CHUNKS, INTERVAL) }))
    const urls = ports.map(port => `http://127.0.0.1:${port}`)
    const rows = LOADS.map((): Array<Array<string | number>> => [])
    for (const cores of counts) {
      // What the load and the servers can do at most.
      const sides: Side[] = cores === counts.at(-1) ? [{ label: 'no router', cores, ports, compiles: false, figures: [] }] : []
      for (const kind of kinds) {
        if (kind.single === true && cores > 1) continue
        context.log(`  ${kind.label} on ${cores}`)
        const router = await Router.start(kind, urls, cores, join(folder, `${kind.label.replaceAll(/\W+/g, '-')}-${cores}`))
        routers.push(router)
        sides.push({ label: kind.label, cores, ports: [router.port], router, compiles: kind.compiles === true, figures: [] })
      }
      for (const [i, load] of LOADS.entries()) {
        context.log(`  ${load.label} on ${cores}`)
        const body = load.body()
        for (let round = -1; round < ROUNDS; round++) {
          for (const side of sides) {
            const warmUp = side.compiles ? load.compiling : WARM_UP_MS
            const figures = await measure(side, loads, { path: PATH, body, connections: load.connections * cores, ms: round < 0 ? warmUp : seconds * 1000 / ROUNDS })
            if (round < 0) continue
            side.figures.push(figures)
            context.log(`    ${side.label}: ${figures.rate.toFixed(0)} requests/s, ${figures.cpu.toFixed(0)} us`)
          }
        }
        rows[i]!.push(...sides.map(rowOf))
        for (const side of sides) side.figures.length = 0
      }
      await Promise.all(routers.splice(0).map(async router => { await router.close() }))
    }
    return report(rows, counts, each, seconds, missing)
  } finally {
    await Promise.all(routers.map(async router => { await router.close() }))
    for (const peer of [...backends, ...loads]) peer.close()
    await rm(folder, { recursive: true, force: true })
  }
}

async function measure (side: Side, loads: readonly Peer[], { connections, ...load }: { path: string, body: string, connections: number, ms: number }): Promise<Figures> {
  const before = side.router?.cpu() ?? Number.NaN
  const results = await Promise.all(loads.map(async (peer, i) =>
    await peer.call<LoadResult>('run', { ...load, port: side.ports[i % side.ports.length]!, connections: Math.ceil(connections / loads.length) })))
  const cpu = (side.router?.cpu() ?? Number.NaN) - before
  const requests = results.reduce((sum, result) => sum + result.requests, 0)
  const elapsed = Math.max(...results.map(result => result.elapsed))
  const latencies = results.flatMap(result => result.latencies)
  return {
    rate: requests / elapsed * 1000,
    cpu: cpu / requests,
    busy: cpu / 1000 / elapsed,
    p50: median(latencies),
    p99: quantile(latencies, 0.99),
    failures: results.reduce((sum, result) => sum + result.failures, 0)
  }
}

function rowOf ({ label, cores, router, figures }: Side): Array<string | number> {
  const of = (key: keyof Figures): number => median(figures.map(figure => figure[key]))
  const failures = figures.reduce((sum, figure) => sum + figure.failures, 0)
  return [router === undefined ? '' : String(cores), label, of('rate'), router === undefined ? Number.NaN : of('rate') / cores, of('cpu'), of('busy'), of('p50'), of('p99'), String(failures)]
}

function report (rows: ReadonlyArray<ReadonlyArray<ReadonlyArray<string | number>>>, counts: readonly number[], each: number, seconds: number, missing: readonly string[]): string {
  return [
    '## Beside other routers, on many cores',
    '',
    `Requests per second with ${counts.join(', ')} core${counts.at(-1) === 1 ? '' : 's'} for the router (processes of \`fastify-epd serve --workers\` and of nginx, threads of smg and vllm-router), and model servers without a model and load generators on the other cores, ${each} of each; loopback. Medians of ${ROUNDS} interleaved rounds, ${seconds} s in all for each row. ` +
    'A router whose busy cores are fewer than its cores waited for the load: its CPU per request counts then, not its rate. "No router" is the load straight at the model servers, with as many clients as for the most cores. nginx relays without looking or buffering; smg and vllm-router take turns (`round_robin`), this gateway counts tokens (`least-tokens`).' +
    (missing.length === 0 ? '' : ` Not installed, so left out: ${missing.join(', ')}.`),
    ...LOADS.flatMap(({ label, connections }, i) => [
      '',
      `### ${label}, ${connections} clients a core`,
      '',
      table(['cores', 'router', 'requests/s', 'a core', 'CPU us/request', 'busy cores', 'p50 ms', 'p99 ms', 'failed'], rows[i]!)
    ])
  ].join('\n')
}
