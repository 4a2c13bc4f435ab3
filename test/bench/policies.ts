/** Conversations of several turns under each routing policy: how much of their prompts the engines find in their caches. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { POLICIES, type PolicyName } from '../../plugin/planning/index.ts'
import { seeded } from '../helper/random.ts'
import { drawScene } from '../helper/scenes.ts'
import { startGateway, stopGateway } from './gateway-process.ts'
import { quantile, table, type BenchContext } from './report.ts'

export const name = 'policies'

const ENGINES = 4
const CLIENTS = 6
const TURNS = 4
/** One conversation of so many is about a picture. */
const PICTURES = 4
const WORDS = ['red', 'square', 'the', 'blue', 'of', 'circle', 'two', 'and', 'small', 'near', 'a', 'green']

interface Usage { readonly prompt_tokens: number, readonly prompt_tokens_details: { readonly cached_tokens: number } }
interface Side { readonly policy: PolicyName, prompt: number, cached: number, readonly later: number[] }

/** Asks once. @returns the answer */
async function ask (url: string, messages: readonly object[], session: string, turn: number, side: Side): Promise<string> {
  const body = { model: 'tiny-internvl', temperature: 0, max_tokens: 24, stream: true, stream_options: { include_usage: true }, messages }
  const start = performance.now()
  const response = await fetch(`${url}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json', 'x-session-id': session }, body: JSON.stringify(body) })
  if (response.status !== 200) throw new Error(`${side.policy}: ${response.status} ${(await response.text()).slice(0, 300)}`)
  let first: number | undefined
  let text = ''
  for await (const chunk of response.body as unknown as AsyncIterable<Uint8Array>) {
    first ??= performance.now() - start
    text += Buffer.from(chunk).toString()
  }
  const events = text.split('\n\n').filter(line => line.startsWith('data: {')).map(line => JSON.parse(line.slice(6)) as { usage?: Usage | null, choices: Array<{ delta: { content?: string } }> })
  const usage = events.findLast(event => event.usage !== undefined && event.usage !== null)!.usage!
  side.prompt += usage.prompt_tokens
  side.cached += usage.prompt_tokens_details.cached_tokens
  if (turn > 0) side.later.push(first!)
  return events.map(({ choices: [choice] }) => choice?.delta.content ?? '').join('')
}

/** One turn after the other: each call asks once. @returns whether there is another */
function conversation (url: string, id: number, picture: string | undefined, side: Side): () => Promise<boolean> {
  const pick = seeded(id)
  const say = (count: number): string => Array.from({ length: count }, () => WORDS[pick(WORDS.length)]).join(' ')
  const messages: object[] = []
  let turn = 0
  return async () => {
    const text = `${id}. ${say(turn === 0 ? 80 : 20)}?`
    const seen = turn === 0 && picture !== undefined
    messages.push({ role: 'user', content: seen ? [{ type: 'image_url', image_url: { url: picture } }, { type: 'text', text }] : text })
    messages.push({ role: 'assistant', content: await ask(url, messages, `conversation ${id}`, turn, side) })
    return ++turn < TURNS
  }
}

async function measure (folder: string, policy: PolicyName, pictures: readonly string[], conversations: number): Promise<Side> {
  const gateway = await startGateway(folder, policy, { embedded: { encoders: 0, engines: ENGINES }, routing: { policy } })
  const side: Side = { policy, prompt: 0, cached: 0, later: [] }
  try {
    // Users read before they ask again: others ask in between. A turn right after the last would find the node that this one has freed.
    const waiting = Array.from({ length: conversations }, (_, id) => conversation(gateway.url, id, id % PICTURES === 0 ? pictures[id / PICTURES] : undefined, side))
    await Promise.all(Array.from({ length: CLIENTS }, async () => {
      for (let next = waiting.shift(); next !== undefined; next = waiting.shift()) if (await next()) waiting.push(next)
    }))
  } finally {
    await stopGateway(gateway)
  }
  return side
}

export async function run (context: BenchContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'epd-bench-'))
  const conversations = context.quick ? 12 : 48
  try {
    const pictures = await Promise.all(Array.from({ length: conversations / PICTURES }, (_, seed) => drawScene(7000 + seed)))
    const sides: Side[] = []
    for (const policy of POLICIES) {
      context.log(`  ${policy}`)
      sides.push(await measure(folder, policy, pictures, conversations))
    }
    const share = ({ cached, prompt }: Side): number => cached / prompt
    const least = share(sides.find(({ policy }) => policy === 'least-tokens')!)
    return [
      '## Policies',
      `${ENGINES} engines of the shipped model behind a gateway; ${conversations} conversations of ${TURNS} turns, every ${PICTURES}th about a picture, ${CLIENTS} requests at a time. Between two turns of a conversation the others have theirs. Each policy has fresh engines. ` +
        'Hits: the share of all prompt tokens that the engines found in their prefix caches. Time to first token of the turns after the first, the policies one after the other.',
      table(['policy', 'hits', 'vs least-tokens', 'TTFT p50 ms', 'TTFT p99 ms'],
        sides.map(side => [side.policy, `${(100 * share(side)).toFixed(1)} %`, `${(share(side) / least).toFixed(2)}x`, quantile(side.later, 0.5), quantile(side.later, 0.99)]))
    ].join('\n\n')
  } finally {
    await rm(folder, { recursive: true })
  }
}
