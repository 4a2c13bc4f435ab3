/** What nodes say of the longest prompt that they take, and which of them a request certainly does not fit. */
import type { Body } from '../body/index.ts'
import { remembered, those, type RegistrySnapshot } from '../registry/index.ts'
import { NO_POOL, poolsOf } from './pools.ts'
import type { Pool, Refusal } from './types.ts'

/** Smaller bodies fit everywhere, in bytes. */
export const SMALL_BODY = 4_096

/** Servers that refuse a prompt of more tokens than `max_model_len`, whatever their options are. Others may cut it. */
const REFUSE: readonly unknown[] = ['fastify-epd', 'vllm']
/** With it, vLLM cuts the prompt. */
const CUTS = 'truncate_prompt_tokens'
/** More are not counted: 20 ms. */
const MOST = 1 << 20
const [COMMA, OPEN, QUOTE] = [0x2c, 0x5b, 0x22]

/** How much a request has of something, at least, and how much of it each node takes. */
interface Measure {
  readonly param: string
  readonly amount: number
  readonly unit: string
  limit (card: Readonly<Record<string, unknown>>): unknown
}

/** What the nodes that could answer a request for a model say of it. */
const cardsOf = remembered(({ hybrids, prefills, decodes }: Pool, model: string) => [...hybrids, ...prefills, ...decodes].map(node => ({ node, card: node.info?.cards?.find(({ id }) => id === model) })))

/** The snapshot without the nodes that this request certainly does not fit; a refusal when it fits none of those that could answer it. */
export function roomFor (body: Body, path: string, snapshot: RegistrySnapshot): RegistrySnapshot | Refusal {
  const measures = measuresOf(body, path)
  const answering = cardsOf(poolsOf(snapshot.nodes).get(body.model) ?? NO_POOL, body.model)
  const exceeded = ({ card }: typeof answering[number]): Measure | undefined => measures.find(measure => measure.amount > limitOf(measure, card))
  const small = answering.filter(one => exceeded(one) !== undefined)
  if (small.length === 0) return snapshot
  const without = new Set(small.map(({ node }) => node))
  if (small.length < answering.length) return { ...snapshot, nodes: those(snapshot.nodes, node => !without.has(node)) }
  const measure = exceeded(small[0]!)!
  const largest = Math.max(...answering.map(({ card }) => limitOf(measure, card)).filter(Number.isFinite))
  return { refused: 'EPD_ERR_CONTEXT_LENGTH', reason: `at most ${largest} ${measure.unit}, prompt and answer together, and the request has ${measure.amount} or more`, param: measure.param }
}

function limitOf ({ limit }: Measure, card: Readonly<Record<string, unknown>> | undefined): number {
  const found = card === undefined ? undefined : limit(card)
  return typeof found === 'number' && found > 0 ? found : Infinity
}

function measuresOf (body: Body, path: string): Measure[] {
  const own = (name: string) => ({ epd }: Readonly<Record<string, unknown>>): unknown => (epd as Record<string, unknown> | null | undefined)?.[name]
  const [route] = path.split('?', 1)
  if (route === '/v1/chat/completions') {
    const { messages, characters } = body.size
    return [{ param: 'messages', amount: messages, unit: 'messages and parts', limit: own('max_messages') }, { param: 'messages', amount: characters, unit: 'characters', limit: own('max_characters') }]
  }
  const prompt = route === '/v1/completions' ? body.json('prompt') : undefined
  if (prompt?.[0] === QUOTE) return [{ param: 'prompt', amount: Math.floor((prompt.length - 2) / 6), unit: 'characters', limit: own('max_characters') }]
  if (prompt?.[0] !== OPEN || body.has(CUTS)) return []
  return [{ param: 'prompt', amount: tokenIds(prompt), unit: 'tokens', limit: card => REFUSE.includes(card.owned_by) ? card.max_model_len : undefined }]
}

/** Of one prompt given as token ids, up to what no model takes; 0 for texts, and for several prompts. */
function tokenIds (json: Buffer): number {
  if (!/^\[\s*\d/.test(json.toString('latin1', 0, 64))) return 0
  let count = 1
  for (let at = json.indexOf(COMMA); at !== -1 && count < MOST; at = json.indexOf(COMMA, at + 1)) count++
  return count
}
