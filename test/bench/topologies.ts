/** The same engines in different roles: latency of text and picture requests side by side, over the same number of processes. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'
import { startGateway, stopGateway, type GatewayProcess } from './gateway-process.ts'
import { quantile, table, type BenchContext } from './report.ts'

export const name = 'topologies'

const PROCESSES = 3
const PICTURES = 4
/** Clients in a closed loop: so many ask about text, so many about pictures. */
const CLIENTS = { text: 6, pictures: 2 }
const TOKENS = { text: 64, pictures: 16 }

interface Topology { readonly title: string, readonly embedded: Readonly<Record<string, number>>, readonly plans: { readonly text: string, readonly pictures: string } }

const TOPOLOGIES: readonly Topology[] = [
  { title: '3 hybrid', embedded: { encoders: 0, engines: 3 }, plans: { text: 'pd', pictures: 'hybrid' } },
  { title: '1 E + 2 PD', embedded: { encoders: 1, engines: 2 }, plans: { text: 'pd', pictures: 'e-pd' } },
  { title: '1 P + 2 D, P encodes', embedded: { encoders: 0, engines: 0, prefill: 1, decode: 2 }, plans: { text: 'p-d', pictures: 'p-d' } },
  { title: '1 E + 1 P + 1 D', embedded: { encoders: 1, engines: 0, prefill: 1, decode: 1 }, plans: { text: 'p-d', pictures: 'e-p-d' } }
]

type Kind = keyof typeof CLIENTS

/** Milliseconds of one kind of request, in one topology. */
interface Times { readonly first: number[], readonly gaps: number[] }

interface Side { readonly topology: Topology, readonly gateway: GatewayProcess, readonly url: string, readonly times: Record<Kind, Times>, tokens: number, seconds: number }

async function serve (folder: string, topology: Topology): Promise<Side> {
  const gateway = await startGateway(folder, topology.title, { embedded: topology.embedded, bypass: 'never' })
  return { topology, gateway, url: gateway.url, times: { text: { first: [], gaps: [] }, pictures: { first: [], gaps: [] } }, tokens: 0, seconds: 0 }
}

/** Asks once and records the times of events. */
async function ask ({ url, topology, times }: Side, kind: Kind, urls: readonly string[], id: number): Promise<number> {
  const content = [...urls.map(picture => ({ type: 'image_url', image_url: { url: picture } })), { type: 'text', text: `${id}. How many shapes are there in all pictures? ` + 'Take your time. '.repeat(6) }]
  const body = { model: 'tiny-internvl', temperature: 0, stream: true, ignore_eos: true, max_tokens: TOKENS[kind], messages: [{ role: 'user', content }] }
  const start = performance.now()
  const response = await fetch(`${url}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) })
  const plan = response.headers.get('x-epd-plan')
  if (response.status !== 200 || plan !== topology.plans[kind]) throw new Error(`${topology.title}: ${response.status}, plan ${plan}, ${(await response.text()).slice(0, 300)}`)
  let before: number | undefined
  let events = 0
  for await (const chunk of response.body as unknown as AsyncIterable<Uint8Array>) {
    const now = performance.now()
    const tokens = Buffer.from(chunk).toString('latin1').split('"content":"').length - 1
    if (tokens === 0) continue
    if (before === undefined) times[kind].first.push(now - start)
    else for (let i = 0; i < tokens; i++) times[kind].gaps.push((now - before) / tokens)
    before = now
    events += tokens
  }
  return events
}

async function round (side: Side, draw: (n: number) => readonly string[], perClient: number): Promise<void> {
  const start = performance.now()
  const kinds = (Object.keys(CLIENTS) as Kind[]).flatMap(kind => Array.from({ length: CLIENTS[kind] }, () => kind))
  await Promise.all(kinds.map(async (kind, client) => {
    for (let i = 0; i < perClient; i++) {
      const n = client * perClient + i
      const tokens = await ask(side, kind, kind === 'text' ? [] : draw(n), n)
      side.tokens += tokens
    }
  }))
  side.seconds += (performance.now() - start) / 1000
}

function forget (side: Side): void {
  for (const { first, gaps } of Object.values(side.times)) first.length = gaps.length = 0
  side.tokens = side.seconds = 0
}

/** Pictures and prompts of an earlier round must not be found. */
async function clearCaches ({ url }: Side): Promise<void> {
  const nodes = Object.keys(await (await fetch(`${url}/nodes/status`)).json() as object)
  await Promise.all(nodes.map(node => fetch(`${node}/distserve/clear_cache`, { method: 'POST' })))
}

function rowOf ({ topology, times, tokens, seconds }: Side): Array<string | number> {
  const both = (values: readonly number[]): string => `${quantile(values, 0.5).toFixed(1)} / ${quantile(values, 0.99).toFixed(0)}`
  return [topology.title, both(times.text.first), both(times.text.gaps), both(times.pictures.first), both(times.pictures.gaps), tokens / seconds]
}

export async function run (context: BenchContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'epd-bench-'))
  const sides: Side[] = []
  try {
    for (const topology of TOPOLOGIES) sides.push(await serve(folder, topology))
    const perClient = context.quick ? 2 : 4
    const clients = CLIENTS.text + CLIENTS.pictures
    const pictures = await Promise.all(Array.from({ length: clients * perClient * PICTURES }, (_, seed) => drawScene(5000 + seed)))
    const draw = (n: number): readonly string[] => pictures.slice(n * PICTURES, (n + 1) * PICTURES)
    for (let i = -1; i < context.rounds; i++) {
      for (const side of sides) {
        if (i === 0) forget(side)
        await clearCaches(side)
        await round(side, draw, perClient)
        // Requests that are still ending count for this side, not for the next.
        await until(async () => Object.values(await (await fetch(`${side.url}/nodes/status`)).json() as Record<string, { unfinished: number }>).every(node => node.unfinished === 0), 'nothing is in flight')
      }
      context.log(`  round ${i + 1}`)
    }
    return [
      '## Topologies',
      `${PROCESSES} engine processes of the shipped model behind the gateway, in different roles; ${CLIENTS.text} clients ask text questions (${TOKENS.text} tokens of answer) and ${CLIENTS.pictures} ask about ${PICTURES} pictures at a time ` +
        `(${TOKENS.pictures} tokens), each right after its last answer; no picture or prompt is cached. Milliseconds, p50 / p99: time to first token (TTFT) and between tokens (ITL), as the client sees them.`,
      table(['engines', 'text TTFT', 'text ITL', 'pictures TTFT', 'pictures ITL', 'tokens/s in all'], sides.map(rowOf))
    ].join('\n\n')
  } finally {
    await Promise.all(sides.map(async side => { await stopGateway(side.gateway) }))
    await rm(folder, { recursive: true })
  }
}
