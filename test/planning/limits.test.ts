/** What certainly fits no node is refused before it is sent to one; nothing else is. */
import t from 'tap'
import { parseBody } from '../../plugin/body/index.ts'
import { roomFor } from '../../plugin/planning/index.ts'
import type { NodeSnapshot, RegistrySnapshot } from '../../plugin/registry/index.ts'
import { Random } from '../body/random-json.ts'
import { ONE } from '../helper/media-spellings.ts'
import { ask, COMPLETION, gatewayFor, json, modelServer } from '../helper/model-server.ts'

const CHAT = '/v1/chat/completions'
type Card = Record<string, unknown>
const ours = (tokens: number, characters: number): Card => ({ id: 'm', owned_by: 'fastify-epd', max_model_len: tokens, epd: { max_messages: tokens, max_characters: characters } })

function snapshot (...cards: Array<Card | undefined>): RegistrySnapshot {
  const nodes = cards.map((card, i) => ({ id: `n${i}`, role: 'hybrid', models: ['m'], info: { cards: card === undefined ? undefined : [{ id: 'other', epd: { max_messages: 1 } }, card] } }) as unknown as NodeSnapshot)
  return { version: 1, nodes, byId: new Map(), models: ['m'], link: () => 'none' }
}

async function outcome (body: object, path: string, ...cards: Array<Card | undefined>): Promise<string> {
  const found = roomFor(await parseBody(Buffer.from(JSON.stringify({ model: 'm', ...body }))), path, snapshot(...cards))
  return 'refused' in found ? `${found.refused} (${found.param}): ${found.reason}` : found.nodes.map(({ id }) => id).join(' ')
}

const chat = (messages: number, text = 'a'): object => ({ messages: Array.from({ length: messages }, () => ({ role: 'user', content: text })) })

t.test('a request goes to nodes that it fits, and is refused where it fits none', async t => {
  const small = ours(100, 1_000)
  const large = ours(1_000, 10_000)
  t.equal(await outcome(chat(100), CHAT, small, large), 'n0 n1')
  t.equal(await outcome(chat(101), CHAT, small, large), 'n1')
  t.equal(await outcome(chat(1_001), CHAT, small, large), 'EPD_ERR_CONTEXT_LENGTH (messages): at most 1000 messages and parts, prompt and answer together, and the request has 1001 or more')
  t.equal(await outcome(chat(1_001), CHAT, small, undefined), 'n1', 'a node that says nothing may take it')
  t.equal(await outcome({ messages: [{ role: 'user', content: Array.from({ length: 200 }, () => ({ type: 'text', text: 'a' })) }] }, CHAT, small, large), 'n1', 'parts count')
  t.equal(await outcome(chat(1, 'a'.repeat(3_010)), CHAT, small, large), 'n1', 'characters do')
  t.match(await outcome(chat(1, 'a'.repeat(30_010)), CHAT, small, large), /^EPD_ERR_CONTEXT_LENGTH \(messages\): at most 10000 characters/)
  t.equal(await outcome(chat(1, 'a'.repeat(3_000)), CHAT, small), 'n0', 'a letter may take three bytes')
  t.equal(await outcome({ ...chat(1), metadata: 'a'.repeat(99_999) }, CHAT, small), 'n0', 'only messages count')
  t.equal(await outcome(chat(5_000), '/v1/messages', small), 'n0', 'what other routes make of it is unknown')
})

t.test('prompts of completions', async t => {
  const ids = (count: number): object => ({ prompt: Array.from({ length: count }, (_, i) => i) })
  const path = '/v1/completions'
  const vllm = { id: 'm', owned_by: 'vllm', max_model_len: 100 }
  t.equal(await outcome(ids(100), path, vllm), 'n0')
  t.match(await outcome(ids(101), path, vllm), /^EPD_ERR_CONTEXT_LENGTH \(prompt\): at most 100 tokens/)
  t.match(await outcome(ids(101), path, ours(100, 1_000)), /^EPD_ERR_CONTEXT_LENGTH \(prompt\)/)
  t.equal(await outcome({ ...ids(101), truncate_prompt_tokens: 10 }, path, vllm), 'n0')
  t.equal(await outcome(ids(101), path, { ...vllm, owned_by: 'sglang' }), 'n0', 'a server that may cut it')
  t.equal(await outcome({ prompt: [Array.from({ length: 200 }, () => 1), [2]] }, path, vllm), 'n0', 'several prompts')
  t.equal(await outcome({ prompt: 'a'.repeat(90_000) }, path, vllm), 'n0', 'how many tokens a text has is not known')
  t.match(await outcome({ prompt: 'a'.repeat(6_010) }, path, ours(100, 1_000)), /^EPD_ERR_CONTEXT_LENGTH \(prompt\): at most 1000 characters/)
  t.equal(await outcome({ prompt: 'a'.repeat(6_000) }, path, ours(100, 1_000)), 'n0', 'each letter may be an escape')
})

t.test('cards that make no sense limit nothing', async t => {
  for (const limit of [0, -1, '5', null, NaN, {}]) t.equal(await outcome(chat(50), CHAT, { id: 'm', owned_by: 'vllm', max_model_len: limit, epd: { max_messages: limit, max_characters: limit } }), 'n0', String(limit))
  for (const epd of [null, 7, 'x', []]) t.equal(await outcome(chat(50), CHAT, { id: 'm', epd }), 'n0')
})

t.test('what is counted is never more than there is, however it is written', async t => {
  const random = new Random(18)
  for (let i = 0; i < 300; i++) {
    let [messages, characters] = [0, 0]
    const text = (): string => {
      const found = random.string()
      characters += found.length
      return found
    }
    const part = (): unknown => {
      messages++
      return random.below(4) === 0 ? random.pick(Object.values(ONE)) : { type: 'text', text: text() }
    }
    const list = Array.from({ length: random.below(6) }, () => {
      messages++
      return { role: 'user', name: random.string(), content: random.below(2) === 0 ? text() : Array.from({ length: random.below(5) }, part) }
    })
    const body = await parseBody(Buffer.from(random.spaced(Object.fromEntries(random.shuffle(Object.entries({ model: 'm', vllm_xargs: { a: 1, b: 2 }, input: [{ role: 'user', content: [{ type: 'text', text: 'x' }] }], messages: list, more: random.string() }))))))
    if (body.size.messages !== messages) t.equal(body.size.messages, messages)
    if (body.size.characters > characters || body.size.characters < Math.floor(characters / 6)) t.fail(`${body.size.characters} of ${characters}`)
  }
})

t.test('a client gets 400 that names the field, and no node gets the request', async t => {
  const node = await modelServer(t, (_request, response) => { json(response, 200, COMPLETION) }, { owned_by: 'fastify-epd', max_model_len: 1_000, epd: { max_messages: 1_000, max_characters: 9_000 } })
  const { post } = await gatewayFor(t, [node])
  t.match(await post({ ...ask(), ...chat(1_001), model: 'm' }), { status: 400, body: { error: { code: 'context_length_exceeded', type: 'invalid_request_error', param: 'messages', message: /1000 messages and parts/ } } })
  t.equal(node.asked, 0)
  t.equal((await post({ ...ask(), ...chat(900), model: 'm' })).status, 200)
})
