import { request as httpRequest, type ClientRequest } from 'node:http'
import { Peer, PLACEMENT } from './processes.ts'
import { median, table, type BenchContext } from './report.ts'

interface LoadResult { requests: number, failures: number, latencies: number[] }

const BODY = JSON.stringify({ model: 'm', messages: [{ role: 'user', content: 'y'.repeat(100) }] })
const PATH = '/v1/chat/completions'

/** Short and many, side after side: what else a machine does then falls on both. */
const SLICES = 8
const CONNECTIONS = 20
type Kind = 'without' | 'with'
interface Used { requests: number, cpu: number, ms: number }

/** What an open page costs: the gateway's CPU at 100 requests/s, and for each request at the most it can serve, without and with a reader of the feed. */
export async function measurePage (context: BenchContext): Promise<string> {
  const upstream = new Peer(new URL('./relay-upstream.js', import.meta.url), [], 1)
  const load = new Peer(new URL('./relay-load.js', import.meta.url), [], 1)
  const origin = await upstream.call<number>('port')
  const gateway = new Peer(new URL('./telemetry-gateway.js', import.meta.url), [String(origin)], 0)
  try {
    const port = await gateway.call<number>('port')
    const slice = async (kind: Kind, ms: number, perSecond?: number): Promise<Used> => {
      const page = kind === 'with' ? await openPage(port) : undefined
      await gateway.call('cpu')
      const { requests, failures } = await load.call<LoadResult>('run', { port, path: PATH, connections: CONNECTIONS, ms, body: BODY, perSecond })
      const cpu = await gateway.call<number>('cpu')
      page?.destroy()
      if (failures > 0) throw new Error('requests failed')
      return { requests, cpu, ms }
    }
    await slice('without', 2_000)
    const paced = await rounds(context, kind => slice(kind, context.quick ? 1_000 : 2_000, 100))
    const full = await rounds(context, kind => slice(kind, 1_000))
    return report(paced, full)
  } finally {
    for (const peer of [upstream, load, gateway]) peer.close()
  }
}

type Rounds = Record<Kind, Used[]>

/** Sums of the slices, round by round. */
async function rounds (context: BenchContext, measure: (kind: Kind) => Promise<Used>): Promise<Rounds> {
  const sums: Rounds = { without: [], with: [] }
  for (let round = 0; round < context.rounds; round++) {
    for (const kind of ['without', 'with'] as const) sums[kind].push({ requests: 0, cpu: 0, ms: 0 })
    for (let n = 0; n < SLICES; n++) {
      const kind = (n >> 1) % 2 === n % 2 ? 'without' : 'with'
      const used = await measure(kind)
      const sum = sums[kind].at(-1)!
      for (const key of ['requests', 'cpu', 'ms'] as const) sum[key] += used[key]
    }
  }
  return sums
}

function report (paced: Rounds, full: Rounds): string {
  const row = (kind: Kind): number[] => [
    median(paced[kind].map(({ cpu, ms }) => cpu / ms)),
    median(full[kind].map(({ cpu, requests }) => cpu / requests)),
    median(full[kind].map(({ requests, ms }) => requests / ms * 1_000))
  ]
  const [without, beside] = [row('without'), row('with')]
  const more = median(full.with.map(({ cpu, requests }, i) => cpu / requests / (full.without[i]!.cpu / full.without[i]!.requests))) - 1
  return [
    '### The page', '',
    `A gateway with tracing, metrics and the memory store, without and with a page open (its feed is read, a trace fetched each second); ${PLACEMENT}. Slices of one or two seconds, ${SLICES} a round, both sides in turn. The budget is 5 % of throughput.`, '',
    table(['', 'CPU at 100 requests/s, ms/s', `CPU a request at the most it can serve (${CONNECTIONS} connections), us`, 'requests/s then'], [['no page', ...without], ['one page', ...beside]]), '',
    `At 100 requests/s the page takes ${((beside[0]! - without[0]!) / 10).toFixed(2)} % of one core; at the most the gateway can serve, a request takes ${(100 * more).toFixed(1)} % more CPU beside it.`
  ].join('\n')
}

async function openPage (port: number): Promise<ClientRequest> {
  const feed = httpRequest({ port, host: '127.0.0.1', path: '/epd/feed' })
  await new Promise<void>((resolve, reject) => {
    feed.on('error', reject)
    feed.on('response', response => {
      resolve()
      let text = ''
      response.setEncoding('utf8').on('data', (chunk: string) => {
        text += chunk
        if (!text.endsWith('\n\n')) return
        const { traces } = JSON.parse(text.slice(text.lastIndexOf('data: ') + 6)) as { traces: Array<{ traceId: string }> }
        text = ''
        if (traces[0] !== undefined) fetch(`http://127.0.0.1:${port}/epd/traces/${traces[0].traceId}`).then(answer => answer.arrayBuffer()).catch(() => {})
      }).on('error', () => {})
    })
    feed.end()
  })
  return feed
}
