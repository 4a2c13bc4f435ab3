import { request as httpRequest, type ClientRequest } from 'node:http'
import { Peer, PLACEMENT } from './processes.ts'
import { median, table, type BenchContext } from './report.ts'

interface LoadResult { requests: number, failures: number, latencies: number[] }

const BODY = JSON.stringify({ model: 'm', messages: [{ role: 'user', content: 'y'.repeat(100) }] })
const PATH = '/v1/chat/completions'

/** What an open page costs: the gateway's CPU at 100 requests/s, and how many it can serve at most, without and with a reader of the feed. */
export async function measurePage (context: BenchContext): Promise<string> {
  const upstream = new Peer(new URL('./relay-upstream.js', import.meta.url), [], 1)
  const load = new Peer(new URL('./relay-load.js', import.meta.url), [], 1)
  const origin = await upstream.call<number>('port')
  const gateway = new Peer(new URL('./telemetry-gateway.js', import.meta.url), [String(origin)], 0)
  try {
    const port = await gateway.call<number>('port')
    const ms = context.quick ? 2_000 : 5_000
    const sides = { without: { cpu: [] as number[], rate: [] as number[] }, with: { cpu: [] as number[], rate: [] as number[] } }
    await load.call<LoadResult>('run', { port, path: PATH, connections: 20, ms: 2_000, body: BODY })
    for (let round = 0; round < context.rounds; round++) {
      for (const kind of round % 2 === 0 ? ['without', 'with'] as const : ['with', 'without'] as const) {
        const page = kind === 'with' ? await openPage(port) : undefined
        await gateway.call('cpu')
        const paced = await load.call<LoadResult>('run', { port, path: PATH, connections: 20, ms, body: BODY, perSecond: 100 })
        sides[kind].cpu.push(await gateway.call<number>('cpu') / (ms / 1_000))
        const full = await load.call<LoadResult>('run', { port, path: PATH, connections: 20, ms, body: BODY })
        if (paced.failures + full.failures > 0) throw new Error('requests failed')
        sides[kind].rate.push(full.requests / (ms / 1_000))
        page?.destroy()
      }
    }
    const lost = 1 - median(sides.with.rate.map((rate, i) => rate / sides.without.rate[i]!))
    return [
      '### The page', '',
      `A gateway with tracing, metrics and the memory store, without and with a page open (its feed is read, a trace fetched each second); ${PLACEMENT}. The budget is 5 % of throughput.`, '',
      table(['', 'CPU at 100 requests/s, ms/s', 'requests/s at most, 20 connections'], [
        ['no page', median(sides.without.cpu) / 1_000, median(sides.without.rate)],
        ['one page', median(sides.with.cpu) / 1_000, median(sides.with.rate)]
      ]), '',
      `Of the most it can serve it loses ${(100 * lost).toFixed(1)} %; at 100 requests/s the page takes ${((median(sides.with.cpu) - median(sides.without.cpu)) / 10_000).toFixed(2)} % of one core.`
    ].join('\n')
  } finally {
    for (const peer of [upstream, load, gateway]) peer.close()
  }
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
