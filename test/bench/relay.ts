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
interface Side { readonly cpu: number[], readonly p50: number[], readonly p99: number[], readonly rate: number[], readonly single: number[], readonly chunk: number[], readonly streamP99: number[] }

/**
 * Relays JSON answers and paced token streams, beside what a Fastify gateway would do otherwise. Each round has a new process
 * of each proxy, in another order: processes that run the same differ by up to 30 %, for as long as they live.
 */
export async function run (context: BenchContext): Promise<string> {
  const upstream = new Peer(new URL('./relay-upstream.js', import.meta.url), [], 1)
  const load = new Peer(new URL('./relay-load.js', import.meta.url), [], 1)
  const kinds = Object.keys(KINDS) as Kind[]
  const sides = Object.fromEntries(kinds.map(kind => [kind, { cpu: [], p50: [], p99: [], rate: [], single: [], chunk: [], streamP99: [] }])) as unknown as Record<Kind, Side>
  const direct: number[] = []
  const rounds = context.quick ? context.rounds : 2 * context.rounds - 1
  try {
    const origin = await upstream.call<number>('port')
    for (let round = 0; round < rounds; round++) {
      context.log(`  round ${round + 1} of ${rounds}`)
      direct.push(median((await fire(load, origin, BODY, 1, context.quick ? 250 : 1000)).latencies))
      for (const kind of [...kinds.slice(round % kinds.length), ...kinds.slice(0, round % kinds.length)]) {
        const proxy = new Peer(new URL('./relay-proxy.js', import.meta.url), [String(origin), ...kind.split(' ')], 0)
        try {
          await measure({ context, upstream, load, proxy, side: sides[kind] })
        } finally {
          proxy.close()
        }
      }
    }
    return report(sides, median(direct), rounds)
  } finally {
    upstream.close()
    load.close()
  }
}

async function fire (load: Peer, port: number, body: string, connections: number, ms: number): Promise<LoadResult> {
  const result = await load.call<LoadResult>('run', { port, path: PATH, connections, ms, body })
  if (result.failures > 0) throw new Error(`${result.failures} of ${result.requests} requests failed`)
  return result
}

interface Measured { readonly context: BenchContext, readonly upstream: Peer, readonly load: Peer, readonly proxy: Peer, readonly side: Side }

/**
 * What runs once a stream is compiled late: on a server of 16 cores a chunk took 93 to 108 us of CPU after 200 streams and 38
 * after 6,000, and no less after 32,000. So short streams come first, some thousand of them. The texts come last: what they cost
 * depends on whether there were streams (docs/benchmarks.md), and what they leave on the heap would be charged to the chunks.
 */
async function measure ({ context: { quick }, upstream, load, proxy, side }: Measured): Promise<void> {
  const second = quick ? 250 : 1000
  const port = await proxy.call<number>('port')
  await upstream.call('pace', 20, 10)
  await fire(load, port, STREAM_BODY, 2 * STREAMS, 5 * second)
  await fire(load, port, BODY, 50, second)
  await upstream.call('pace', CHUNKS, INTERVAL)
  await fire(load, port, STREAM_BODY, STREAMS, second)

  await proxy.call('cpu')
  const streams = await fire(load, port, STREAM_BODY, STREAMS, 3 * second)
  side.chunk.push(await proxy.call<number>('cpu') / (streams.requests * (CHUNKS + 1)))
  side.streamP99.push(quantile(streams.latencies, 0.99))

  const texts = await fire(load, port, BODY, 50, 2 * second)
  side.cpu.push(await proxy.call<number>('cpu') / texts.requests)
  side.rate.push(texts.requests * 1000 / (2 * second))
  side.p50.push(median(texts.latencies))
  side.p99.push(quantile(texts.latencies, 0.99))
  side.single.push(median((await fire(load, port, BODY, 1, second)).latencies))
}

function report (sides: Record<Kind, Side>, direct: number, rounds: number): string {
  const rows = (Object.keys(KINDS) as Kind[]).map(kind => ({ kind, ...sides[kind] }))
  const bareOf = (kind: Kind): Side => kind.endsWith(' untuned') ? sides['bare untuned'] : sides.bare
  return [
    '## Relay',
    '',
    `Fastify without logger, keep-alive, an upstream without a model; ${PLACEMENT}. Medians of ${rounds} rounds with a new process each; ratios of these medians. "This package" is the plugin with one node: it checks and splices the body, plans, measures, and can retry. V8 is set as fastify-epd serve sets it but in the last two rows, whose ratios are to the bare relay there.`,
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

function ratio (values: readonly number[], base: readonly number[]): string {
  return `${(median(values) / median(base)).toFixed(2)}x`
}
