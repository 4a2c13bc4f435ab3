import { Peer, PLACEMENT } from './processes.ts'
import { median, quantile, table } from './report.ts'
import type { BenchContext } from './report.ts'

export const name = 'relay'

/** With V8 as `serve` sets it, all of them; the two that matter most also with V8 as it is. */
const KINDS = {
  bare: 'bare Fastify + undici dispatch',
  'reply-from': '@fastify/reply-from',
  parts: 'body and relay of this package alone',
  plugin: 'this package',
  'bare untuned': 'V8 as it is: bare Fastify + undici dispatch',
  'plugin untuned': 'V8 as it is: this package'
} as const
type Kind = keyof typeof KINDS

const PATH = '/v1/chat/completions'
const BODY = JSON.stringify({ model: 'm', messages: [{ role: 'user', content: 'y'.repeat(100) }], max_tokens: 200, temperature: 0 })
const STREAM_BODY = BODY.replace('"model"', '"stream":true,"model"')
const STREAMS = 100
const CHUNKS = 50
const INTERVAL = 20

interface LoadResult { requests: number, failures: number, latencies: number[] }
interface Side { proxy: Peer, port: number, cpu: number[], p50: number[], p99: number[], rate: number[], single: number[], chunk: number[], streamP99: number[] }

/** Relays JSON answers and paced token streams, beside what a Fastify gateway would do otherwise. */
export async function run (context: BenchContext): Promise<string> {
  const upstream = new Peer(new URL('./relay-upstream.js', import.meta.url), [], 1)
  const load = new Peer(new URL('./relay-load.js', import.meta.url), [], 1)
  const peers = [upstream, load]
  try {
    const origin = await upstream.call<number>('port')
    await upstream.call('pace', CHUNKS, INTERVAL)
    const sides = {} as Record<Kind, Side>
    for (const kind of Object.keys(KINDS) as Kind[]) {
      const proxy = new Peer(new URL('./relay-proxy.js', import.meta.url), [String(origin), ...kind.split(' ')], 0)
      peers.push(proxy)
      sides[kind] = { proxy, port: await proxy.call<number>('port'), cpu: [], p50: [], p99: [], rate: [], single: [], chunk: [], streamP99: [] }
    }
    const direct: number[] = []
    // Streams not between the texts: what those have left on the heap is collected in the quieter time of the streams.
    for (const measure of [measureTexts, measureStreams]) {
      await warmUpStreams(context, upstream, load, Object.values(sides))
      for (let round = -1; round < context.rounds; round++) {
        context.log(round < 0 ? '  warming up' : `  round ${round + 1} of ${context.rounds}`)
        await measure({ context, load, origin, sides: Object.values(sides), direct }, round < 0)
      }
    }
    return report(sides, median(direct))
  } finally {
    for (const peer of peers) peer.close()
  }
}

/**
 * What runs once a stream is compiled late: on a server of 16 cores a chunk took 93 to 108 us of CPU after 200 streams and 38
 * after 6,000, and no less after 32,000. Short streams, so that there are so many in 7 s. Before the texts too: what those
 * cost depends on whether there were streams (docs/benchmarks.md).
 */
async function warmUpStreams (context: BenchContext, upstream: Peer, load: Peer, sides: readonly Side[]): Promise<void> {
  await upstream.call('pace', 20, 10)
  for (const { port } of sides) await load.call('run', { port, path: PATH, connections: 2 * STREAMS, ms: context.quick ? 1000 : 7000, body: STREAM_BODY })
  await upstream.call('pace', CHUNKS, INTERVAL)
}

async function fire (load: Peer, port: number, body: string, connections: number, ms: number): Promise<LoadResult> {
  const result = await load.call<LoadResult>('run', { port, path: PATH, connections, ms, body })
  if (result.failures > 0) throw new Error(`${result.failures} of ${result.requests} requests failed`)
  return result
}

interface Measured { readonly context: BenchContext, readonly load: Peer, readonly origin: number, readonly sides: readonly Side[], readonly direct: number[] }

async function measureTexts ({ context, load, origin, sides, direct }: Measured, warmUp: boolean): Promise<void> {
  const ms = context.quick ? 1000 : 4000
  const single = await fire(load, origin, BODY, 1, ms / 4)
  if (!warmUp) direct.push(median(single.latencies))
  for (const side of sides) {
    await side.proxy.call('cpu')
    const json = await fire(load, side.port, BODY, 50, ms)
    const cpu = await side.proxy.call<number>('cpu')
    const one = await fire(load, side.port, BODY, 1, ms / 4)
    if (warmUp) continue
    side.cpu.push(cpu / json.requests)
    side.rate.push(json.requests / (ms / 1000))
    side.p50.push(median(json.latencies))
    side.p99.push(quantile(json.latencies, 0.99))
    side.single.push(median(one.latencies))
  }
}

async function measureStreams ({ context, load, sides }: Measured, warmUp: boolean): Promise<void> {
  const ms = context.quick ? 1000 : 2000
  for (const side of sides) {
    await side.proxy.call('cpu')
    const streams = await fire(load, side.port, STREAM_BODY, STREAMS, ms)
    const cpu = await side.proxy.call<number>('cpu')
    if (warmUp) continue
    side.chunk.push(cpu / (streams.requests * (CHUNKS + 1)))
    side.streamP99.push(quantile(streams.latencies, 0.99))
  }
}

function report (sides: Record<Kind, Side>, direct: number): string {
  const rows = (Object.keys(KINDS) as Kind[]).map(kind => ({ kind, ...sides[kind] }))
  const bareOf = (kind: Kind): Side => kind.endsWith(' untuned') ? sides['bare untuned'] : sides.bare
  return [
    '## Relay',
    '',
    `Fastify without logger, keep-alive, an upstream without a model; ${PLACEMENT}. Medians of the rounds, also of their ratios. "This package" is the plugin with one node: it checks and splices the body, plans, measures, and can retry. V8 is set as fastify-epd serve sets it but in the last two rows, whose ratios are to the bare relay there.`,
    '',
    '### JSON answers of 1 KB',
    '',
    table(['', 'CPU us/request', 'vs bare', 'requests/s, 50 conn.', 'p50 ms', 'p99 ms', 'p50 ms, 1 conn.', 'added ms'],
      rows.map(({ kind, cpu, rate, p50, p99, single }) => [KINDS[kind], median(cpu), ratio(cpu, bareOf(kind).cpu), median(rate), median(p50), median(p99), median(single), median(single) - direct])),
    '',
    `### Token streams: ${STREAMS} at a time, a chunk each every ${INTERVAL} ms`,
    '',
    table(['', 'CPU us/chunk', 'vs bare', `p99 ms (ideal ${CHUNKS * INTERVAL})`],
      rows.map(({ kind, chunk, streamP99 }) => [KINDS[kind], median(chunk), ratio(chunk, bareOf(kind).chunk), median(streamP99)]))
  ].join('\n')
}

/** Median of the rounds' ratios: other work on the machine affects both sides of a round. */
function ratio (values: readonly number[], base: readonly number[]): string {
  return `${median(values.map((value, i) => value / base[i]!)).toFixed(2)}x`
}
