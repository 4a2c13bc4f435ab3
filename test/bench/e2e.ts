import { connect, type Socket } from 'node:net'
import { once } from 'node:events'
import { drawScene } from '../helper/scenes.ts'
import { chatOf } from './chat.ts'
import { Peer, PLACEMENT } from './processes.ts'
import { median, table } from './report.ts'
import type { BenchContext } from './report.ts'

export const name = 'e2e'

const PATH = '/v1/chat/completions'
const MEBIBYTE = 1 << 20

interface Urls { readonly encoders: string[], readonly pd: string }
interface LoadResult { requests: number, failures: number, latencies: number[] }
interface Gateway { readonly proxy: Peer, readonly port: number }

/** Whole requests through encoders, with stubs for engines and, in the end, with engines. */
export async function run (context: BenchContext): Promise<string> {
  return [
    '## Whole requests',
    '',
    `Stub engines that speak the wire; ${PLACEMENT}. Medians of the rounds, each side in a process of its own, interleaved.`,
    '',
    "### Encoder and language model: the gateway's whole CPU",
    '',
    await section(context, 'pictures', pictures),
    '',
    '"Relay" passes the body on as one Buffer without reading it: no encoder, no checks.',
    '',
    '### 16 pictures of 4 MiB in one request, a body of 64 MiB',
    '',
    await section(context, 'a large body', largeBody),
    '',
    'A process of its own for each request, warm from smaller ones. Stall: the longest time the event loop was blocked. Peak: resident memory above that before the request, as a multiple of the body.',
    '',
    '### Memory of idle streams',
    '',
    await section(context, 'idle streams', idleStreams),
    '',
    '### Eight pictures over eight encoders that take 100 ms each',
    '',
    await section(context, 'fan-out', fanOut),
    '',
    '### One small picture, idle system, real engines',
    '',
    await section(context, 'real engines', smallPicture)
  ].join('\n')
}

type Start = (script: string, args: readonly string[], core: number) => Peer

/** Ends with the section all that the section starts. */
async function section (context: BenchContext, what: string, measure: (context: BenchContext, start: Start) => Promise<string>): Promise<string> {
  context.log(`  ${what}`)
  const peers: Peer[] = []
  try {
    return await measure(context, (script, args, core) => {
      const peer = new Peer(new URL(`./${script}.js`, import.meta.url), args, core)
      peers.push(peer)
      return peer
    })
  } finally {
    for (const peer of peers) peer.close()
  }
}

async function gateway (start: Start, kind: string, { pd, encoders }: Urls): Promise<Gateway> {
  const proxy = start('e2e-proxy', [kind, pd, ...encoders], 0)
  return { proxy, port: await proxy.call<number>('port') }
}

async function pictures (context: BenchContext, start: Start): Promise<string> {
  const urls = await start('e2e-nodes', ['2'], 1).call<Urls>('urls')
  const load = start('relay-load', [], 1)
  const sides = await Promise.all(['gateway', 'relay'].map(async kind => ({ kind, ...await gateway(start, kind, urls) })))
  const bodies = { 'text, 1 KB': chatOf(0, 0), '1 picture': chatOf(1, MEBIBYTE), '4 pictures': chatOf(4, MEBIBYTE) }
  const rows: Array<Array<string | number>> = []
  const ms = context.quick ? 700 : 2000
  // The few large requests of a second make V8 compile little: a gateway that has served ten thousand takes two thirds of the CPU.
  for (const { port } of sides) await load.call('run', { port, path: PATH, connections: 8, ms: 5 * ms, body: chatOf(1, 4096) })
  for (const [label, body] of Object.entries(bodies)) {
    const cpu: Record<string, number[]> = {}
    for (let round = -1; round < context.rounds; round++) {
      for (const { kind, proxy, port } of sides) {
        await proxy.call('cpu')
        const { requests, failures } = await load.call<LoadResult>('run', { port, path: PATH, connections: 8, ms, body })
        const used = await proxy.call<number>('cpu')
        if (failures > 0) throw new Error(`${failures} of ${requests} requests failed`)
        if (round >= 0) (cpu[kind] ??= []).push(used / requests / 1000)
      }
    }
    rows.push([label, median(cpu.gateway!), median(cpu.relay!), `${median(cpu.gateway!.map((value, i) => value / cpu.relay![i]!)).toFixed(2)}x`])
  }
  return table(['CPU per request', 'this package, ms', 'relay, ms', 'ratio'], rows)
}

async function largeBody (context: BenchContext, start: Start): Promise<string> {
  const urls = await start('e2e-nodes', ['2'], 1).call<Urls>('urls')
  const load = start('relay-load', [], 1)
  // Four characters of base64 for three bytes.
  const body = chatOf(16, 3 * MEBIBYTE)
  const warmUp = chatOf(2, MEBIBYTE / 4)
  const sides = [['gateway', 'this package'], ['relay', 'relay']] as const
  const found: Record<string, { stalls: number[], peaks: number[] }> = {}
  for (let round = 0; round < context.rounds; round++) {
    for (const [kind, label] of sides) {
      const { proxy, port } = await gateway(start, kind, urls)
      const send = async (body: string, ms: number): Promise<number> => {
        const { requests, failures } = await load.call<LoadResult>('run', { port, path: PATH, connections: 1, ms, body })
        if (failures > 0 || requests === 0) throw new Error(`${failures} of ${requests} requests failed`)
        return requests
      }
      await send(warmUp, 1000)
      await proxy.call('watch')
      // The next one would begin after this time.
      if (await send(body, 100) > 1) throw new Error('more than one large body was sent')
      const { stallMs, bytes } = await proxy.call<{ stallMs: number, bytes: number }>('watched')
      proxy.close()
      const { stalls, peaks } = found[label] ??= { stalls: [], peaks: [] }
      stalls.push(stallMs)
      peaks.push(bytes / body.length)
    }
  }
  const rows = Object.entries(found).map(([label, { stalls, peaks }]) => [label, median(stalls), `${median(peaks).toFixed(2)}x`])
  return table(['', 'longest stall, ms', 'peak memory'], rows)
}

async function idleStreams (context: BenchContext, start: Start): Promise<string> {
  const urls = await start('e2e-nodes', ['1'], 1).call<Urls>('urls')
  const counts = context.quick ? [100, 300] : [500, 1500]
  const rows: Array<Array<string | number>> = []
  for (const [kind, label] of [['gateway', 'this package'], ['relay', 'relay']] as const) {
    const { proxy, port } = await gateway(start, kind, urls)
    const sockets: Socket[] = []
    const readings: number[] = []
    // The first streams also pay for code that is compiled by then.
    await openStreams(sockets, 50, port)
    const idle = await proxy.call<number>('memory')
    for (const count of counts) {
      await openStreams(sockets, count, port)
      readings.push(await proxy.call<number>('memory'))
    }
    for (const socket of sockets) socket.destroy()
    const [few, many] = readings as [number, number]
    rows.push([label, idle / 1e6, few / 1e6, (many - few) / (counts[1]! - counts[0]!) * 1000 / 1e6])
    proxy.close()
  }
  return table(['', 'RSS with 50 streams, MB', `RSS with ${counts[0]}, MB`, 'MB per 1,000 more'], rows)
}

async function openStreams (sockets: Socket[], count: number, port: number): Promise<void> {
  const body = chatOf(0, 0).replace('"model"', '"stream":true,"model"')
  const request = `POST ${PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`
  while (sockets.length < count) {
    const wave = Array.from({ length: Math.min(50, count - sockets.length) }, () => connect({ port, host: '127.0.0.1' }))
    sockets.push(...wave)
    await Promise.all(wave.map(async socket => {
      socket.write(request)
      const [bytes] = await once(socket, 'data') as [Buffer]
      if (!bytes.toString('latin1').startsWith('HTTP/1.1 200')) throw new Error(`a stream was refused: ${bytes.toString('latin1', 0, 200)}`)
      socket.resume()
    }))
  }
}

async function fanOut (context: BenchContext, start: Start): Promise<string> {
  const urls = await start('e2e-nodes', ['8', '100'], 1).call<Urls>('urls')
  const { port } = await gateway(start, 'gateway', urls)
  const times: Record<'whole' | 'single' | 'generate', number[]> = { whole: [], single: [], generate: [] }
  for (let n = -2; n < context.rounds * 3; n++) {
    const body = chatOf(8, 10_000)
    const [whole, single, generate] = [await timed(`http://127.0.0.1:${port}`, body), await timed(urls.encoders[0]!, chatOf(1, 10_000)), await timed(urls.pd, chatOf(0, 0))]
    if (n < 0) continue
    times.whole.push(whole)
    times.single.push(single)
    times.generate.push(generate)
  }
  const [whole, single, generate] = [median(times.whole), median(times.single), median(times.generate)]
  return table(['', 'ms'], [
    ['one encode, straight to an encoder', single],
    ['the language model, straight', generate],
    ['the whole request, 8 pictures', whole],
    ['encode of all 8 over one', `${((whole - generate) / single).toFixed(2)}x`]
  ])
}

async function timed (url: string, body: string, path = PATH): Promise<number> {
  const since = performance.now()
  const response = await fetch(url + path, { method: 'POST', headers: { 'content-type': 'application/json' }, body })
  await response.arrayBuffer()
  if (response.status !== 200) throw new Error(`${url}${path} answered ${response.status}`)
  return performance.now() - since
}

async function smallPicture (context: BenchContext, start: Start): Promise<string> {
  const proxy = start('e2e-proxy', ['engines'], 0)
  const url = `http://127.0.0.1:${await proxy.call<number>('port')}`
  const engine = await proxy.call<string>('engine')
  const { data } = await (await fetch(`${url}/v1/models`)).json() as { data: Array<{ id: string }> }
  const ways = [
    { label: 'the language model encodes, straight to it', origin: engine, path: PATH, times: [] as number[] },
    { label: 'bypass auto', origin: url, path: PATH, times: [] as number[] },
    { label: 'bypass never: E, then PD', origin: url, path: '/never', times: [] as number[] }
  ] as const
  let seed = 1000
  for (let n = -3; n < context.rounds * 4; n++) {
    // The first may find the processor asleep, so the sides take turns.
    for (let i = 0; i < ways.length; i++) {
      const { origin, path, times } = ways[(i + n + ways.length) % ways.length]!
      // Another picture each time, so that no cache has it.
      const picture = await drawScene(seed++)
      const body = JSON.stringify({ model: data[0]!.id, messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: picture } }, { type: 'text', text: 'What shapes are there?' }] }], max_tokens: 16, temperature: 0, ignore_eos: true })
      const ms = await timed(origin, body, path)
      if (n >= 0) times.push(ms)
    }
  }
  await proxy.call('stop')
  const hybrid = median(ways[0].times)
  return table(['', 'p50 ms', 'over hybrid'], ways.map(({ label, times }) => [label, median(times), `${((median(times) / hybrid - 1) * 100).toFixed(0)} %`]))
}
