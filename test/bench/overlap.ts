/** What the language model does while encoders work, and what it brings: `overlap` off and on, each with engines of its own. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { drawScene } from '../helper/scenes.ts'
import { startGateway, stopGateway, type GatewayProcess } from './gateway-process.ts'
import { median, table, type BenchContext } from './report.ts'

export const name = 'overlap'

interface Kind { readonly title: string, readonly pictures: number, readonly words: number }

/** Words of four letters or digits, about four tokens each. */
const KINDS: readonly Kind[] = [
  { title: '1 picture', pictures: 1, words: 0 },
  { title: '4 pictures', pictures: 4, words: 0 },
  { title: '8 pictures', pictures: 8, words: 0 },
  { title: 'a text of 100 words, then 1 picture', pictures: 1, words: 100 }
]
/** Under load: clients that ask about 1 and about 4 pictures. */
const CLIENTS = 8
const SIDES = [false, true]
const PAUSE_MS = 30

interface Side { readonly overlap: boolean, readonly gateway: GatewayProcess, readonly first: Map<Kind, number[]>, readonly rates: Map<Kind, number[]> }

/** Any number of pictures and texts that no cache has seen. */
let seed = 0
const draw = async (n: number): Promise<string[]> => await Promise.all(Array.from({ length: n }, () => drawScene(70_000 + seed++)))

function question ({ words }: Kind, pictures: readonly string[]): object {
  const text = Array.from({ length: words }, (_, i) => (seed * 7919 + i * 104_729).toString(36).slice(-4)).join(' ')
  const before = words === 0 ? [] : [{ role: 'user', content: text }, { role: 'assistant', content: 'Yes.' }]
  const content = [...pictures.map(url => ({ type: 'image_url', image_url: { url } })), { type: 'text', text: 'How many shapes are there in all pictures?' }]
  return { model: 'tiny-internvl', temperature: 0, stream: true, ignore_eos: true, max_tokens: 8, messages: [...before, { role: 'user', content }] }
}

/** Milliseconds to the first token. */
async function ask ({ gateway: { url } }: Side, body: object): Promise<number> {
  const start = performance.now()
  const response = await fetch(`${url}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) })
  if (response.status !== 200 || response.headers.get('x-epd-plan') !== 'e-pd') throw new Error(`${response.status}, ${(await response.text()).slice(0, 300)}`)
  let first: number | undefined
  for await (const chunk of response.body as unknown as AsyncIterable<Uint8Array>) {
    if (first === undefined && Buffer.from(chunk).includes('"content":"')) first = performance.now() - start
  }
  return first!
}

/** Both sides get the same request, in turns. */
async function idle (sides: readonly Side[], round: number): Promise<void> {
  for (const kind of KINDS) {
    const body = question(kind, await draw(kind.pictures))
    for (const side of round % 2 === 0 ? sides : [...sides].reverse()) {
      const took = await ask(side, body)
      if (round >= 0) side.first.get(kind)!.push(took)
      await new Promise(resolve => { setTimeout(resolve, PAUSE_MS) })
    }
  }
}

async function load (side: Side, kind: Kind, ms: number): Promise<void> {
  const left = await draw(CLIENTS * 25)
  const start = performance.now()
  let served = 0
  await Promise.all(Array.from({ length: CLIENTS }, async () => {
    while (performance.now() < start + ms && left.length >= kind.pictures) {
      await ask(side, question(kind, left.splice(0, kind.pictures)))
      served++
    }
  }))
  side.rates.get(kind)!.push(served / (performance.now() - start) * 1000)
}

export async function run (context: BenchContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'epd-bench-'))
  const sides: Side[] = []
  try {
    for (const overlap of SIDES) {
      const gateway = await startGateway(folder, `overlap ${overlap}`, { embedded: { encoders: 1, engines: 1 }, bypass: 'never', overlap })
      sides.push({ overlap, gateway, first: new Map(KINDS.map(kind => [kind, []])), rates: new Map(KINDS.map(kind => [kind, []])) })
    }
    for (let round = -2; round < context.rounds * 5; round++) await idle(sides, round)
    context.log('  one at a time')
    const loaded = KINDS.slice(0, 2)
    for (let round = 0; round < context.rounds; round++) {
      for (const kind of loaded) for (const side of round % 2 === 0 ? sides : [...sides].reverse()) await load(side, kind, context.quick ? 2000 : 5000)
      context.log(`  round ${round + 1} with ${CLIENTS} clients`)
    }
    const [off, on] = sides as [Side, Side]
    const ratio = (one: readonly number[], other: readonly number[]): string => `${median(one.map((value, i) => value / other[i]!)).toFixed(2)}x`
    return [
      '## Overlap',
      'One encoder and one language model engine behind a gateway, with `overlap` off and on, each side with processes of its own; no picture or text is cached. The ratio is the median of the requests\' (of the rounds\') ratios.',
      `One request at a time, the same to both in turns: milliseconds to the first token, medians of ${off.first.get(KINDS[0]!)!.length}.`,
      table(['', 'off', 'on', 'on / off'], KINDS.map(kind => [kind.title, median(off.first.get(kind)!), median(on.first.get(kind)!), ratio(on.first.get(kind)!, off.first.get(kind)!)])),
      `${CLIENTS} clients, each right after its last answer: requests/s.`,
      table(['', 'off', 'on', 'on / off'], loaded.map(kind => [kind.title, median(off.rates.get(kind)!), median(on.rates.get(kind)!), ratio(on.rates.get(kind)!, off.rates.get(kind)!)]))
    ].join('\n\n')
  } finally {
    await Promise.all(sides.map(async side => { await stopGateway(side.gateway) }))
    await rm(folder, { recursive: true })
  }
}
