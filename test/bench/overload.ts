/** Text requests beside an encoder pool that gets several times what it can do: admission must keep the two apart. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Agent, request } from 'undici'
import { chatOf } from './chat.ts'
import { Peer } from './processes.ts'
import { median, quantile, table, type BenchContext } from './report.ts'

export const name = 'overload'

/** Of the one encoder, for a picture; one after the other. */
const ENCODE_MS = 100
/** Clients that ask about a picture each, at once again; a refused one waits that long. */
const CLIENTS = 150
const PAUSE_MS = 500
const PICTURE_BYTES = 20_000
/** A text request begins every so many milliseconds, whatever has become of those before. */
const TEXT_EVERY_MS = 20
const WINDOW_MS = 6_000

interface Urls { readonly encoders: string[], readonly pd: string }

export async function run ({ quick, log }: BenchContext): Promise<string> {
  const peers: Peer[] = []
  const start = (script: string, args: readonly string[], core: number): Peer => {
    const peer = new Peer(new URL(`./${script}.js`, import.meta.url), args, core)
    peers.push(peer)
    return peer
  }
  const agent = new Agent({ connections: 4 * CLIENTS })
  try {
    const { pd, encoders } = await start('e2e-nodes', ['1', String(ENCODE_MS), 'serial'], 1).call<Urls>('urls')
    const port = await start('e2e-proxy', ['gateway', pd, ...encoders], 0).call<number>('port')
    const ask = async (body: string): Promise<number> => {
      const { statusCode, body: answer } = await request(`http://127.0.0.1:${port}/v1/chat/completions`, { dispatcher: agent, method: 'POST', headers: { 'content-type': 'application/json' }, body })
      await answer.dump()
      return statusCode
    }
    const outcomes: Record<string, number> = {}
    const load = { on: false }
    const clients = Array.from({ length: CLIENTS }, () => async () => {
      while (load.on) {
        const status = await ask(chatOf(1, PICTURE_BYTES))
        outcomes[status] = (outcomes[status] ?? 0) + 1
        if (status !== 200) await sleep(PAUSE_MS)
      }
    })
    const text = async (): Promise<number[]> => {
      const times: Array<Promise<number>> = []
      for (const until = performance.now() + WINDOW_MS; performance.now() < until; await sleep(TEXT_EVERY_MS)) {
        const since = performance.now()
        times.push(ask('{"model":"m","messages":[{"role":"user","content":"Hello"}]}').then(status => status === 200 ? performance.now() - since : Infinity))
      }
      return await Promise.all(times)
    }
    const sides = { quiet: [] as number[][], overloaded: [] as number[][] }
    await text()
    for (let round = 0; round < (quick ? 2 : 8); round++) {
      log(`  round ${round + 1}`)
      sides.quiet.push(await text())
      load.on = true
      const flooding = clients.map(client => client())
      // Until the queue is full.
      await sleep(2 * WINDOW_MS / 3)
      sides.overloaded.push(await text())
      load.on = false
      await Promise.all(flooding)
    }
    const row = (side: string, windows: readonly number[][]): Array<string | number> => [side, windows.flat().length, ...[0.5, 0.99].map(q => median(windows.map(window => quantile(window, q))))]
    const [quiet, overloaded] = [row('quiet', sides.quiet), row('overloaded', sides.overloaded)]
    return [
      '## Text beside an overloaded encoder pool', '',
      `One stub encoder that takes ${ENCODE_MS} ms a picture, ${CLIENTS} clients that ask about one picture after the other, all options at their defaults; a text request every ${TEXT_EVERY_MS} ms, in windows of ${WINDOW_MS / 1_000} s with and without the flood in turns. Medians of the windows, in ms.`, '',
      table(['encoder pool', 'requests', 'text p50', 'text p99'], [quiet, overloaded, ['ratio', '', ...[2, 3].map(i => Number(overloaded[i]) / Number(quiet[i]))]]), '',
      `Pictures in the flood by status: ${Object.entries(outcomes).map(([status, count]) => `${count} ${status}`).join(', ')}.`
    ].join('\n')
  } finally {
    for (const peer of peers) peer.close()
    await agent.close()
  }
}
