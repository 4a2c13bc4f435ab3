import { chatOf } from './chat.ts'
import { Peer, PLACEMENT } from './processes.ts'
import { median, quantile, table, trimmedMean, type BenchContext } from './report.ts'

interface LoadResult { requests: number, failures: number }

const PATH = '/v1/chat/completions'
const CONNECTIONS = 8
const SLICE_MS = 200
/** Before each slice, not measured: tracing has just been switched. */
const LEAD_MS = 30
const SIDES = [
  { label: 'text, 1 KB', spans: 3, pictures: 0, bytes: 0 },
  { label: 'a picture of 10 KB', spans: 5, pictures: 1, bytes: 10_000 }
] as const

/**
 * What tracing adds to whole requests: one gateway, whose tracing is switched on and off from slice to slice, as two
 * processes that happen to be laid out differently differ by more than that.
 */
export async function measureWhole (context: BenchContext): Promise<string> {
  const peers: Peer[] = []
  const start = (script: string, args: readonly string[], core: number): Peer => {
    const peer = new Peer(new URL(`./${script}.js`, import.meta.url), args, core)
    peers.push(peer)
    return peer
  }
  try {
    const { pd, encoders } = await start('e2e-nodes', ['2'], 1).call<{ pd: string, encoders: string[] }>('urls')
    const load = start('relay-load', [], 1)
    const proxy = start('e2e-proxy', ['gateway', pd, ...encoders], 0)
    const port = await proxy.call<number>('port')
    const pairs = context.quick ? 20 : 120
    const rows: Array<Array<string | number>> = []
    for (const { label, spans, pictures, bytes } of SIDES) {
      context.log(`  whole requests: ${label}`)
      const body = chatOf(pictures, bytes)
      const run = async (ms: number): Promise<number> => {
        const { requests, failures } = await load.call<LoadResult>('run', { port, path: PATH, connections: CONNECTIONS, ms, body })
        if (failures > 0) throw new Error(`${failures} of ${requests} requests failed`)
        return requests
      }
      /** CPU of a request, in microseconds. */
      const slice = async (traced: boolean): Promise<number> => {
        await proxy.call('trace', traced)
        await run(LEAD_MS)
        await proxy.call('cpu')
        const requests = await run(SLICE_MS)
        return await proxy.call<number>('cpu') / requests
      }
      for (let n = 0; n < 10; n++) await slice(n % 2 === 1)
      const untraced: number[] = []
      const added: number[] = []
      for (let n = 0; n < pairs; n++) {
        const first = await slice(n % 2 === 1)
        const second = await slice(n % 2 === 0)
        untraced.push(n % 2 === 0 ? first : second)
        added.push(n % 2 === 0 ? second - first : first - second)
      }
      rows.push([label, String(spans), median(untraced), trimmedMean(added), `${quantile(added, 0.25).toFixed(0)} to ${quantile(added, 0.75).toFixed(0)}`])
    }
    return [
      '### In whole requests', '',
      `One gateway, its tracing switched on and off from slice to slice; ${PLACEMENT}. ${pairs} pairs of slices of ${SLICE_MS} ms, ${CONNECTIONS} connections, stub engines that send no spans. The mean is that of the middle 70 % of the pairs.`, '',
      table(['', 'spans', 'CPU untraced, us', 'tracing adds, us', 'half of the pairs'], rows)
    ].join('\n')
  } finally {
    for (const peer of peers) peer.close()
  }
}
