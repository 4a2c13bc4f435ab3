/** Which requests go to the same language model, through a gateway. */
import t, { type Test } from 'tap'
import type { EpdOptions } from '../../plugin/index.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { seeded } from '../helper/random.ts'

/** Conversations, so many that each node has some, whatever its port: with 16 one in 25 runs left a node without. */
const MANY = 48
const NODES = 4
const words = (seed: number, count: number): string => Array.from({ length: count }, (_, i) => `${(seed * 7919 + i * 104729) % 9973}`).join(' ')

async function gatewayWith (t: Test, routing: NonNullable<EpdOptions['routing']>) {
  const nodes: FakeNode[] = []
  for (let i = 0; i < NODES; i++) nodes.push(await FakeNode.start(t, { vision: 'full' }))
  const { url } = await buildGateway(t, { nodes, options: { routing } })
  const counts = (): number[] => nodes.map(node => node.generations.length)
  return {
    nodes,
    counts,
    /** Index of the node that answers. */
    async ask (body: unknown, { path = '/v1/chat/completions', headers = {} }: { path?: string, headers?: Record<string, string> } = {}): Promise<number> {
      const before = counts()
      const response = await post(`${url}${path}`, body, { headers })
      t.equal(response.status, 200, await response.text())
      return counts().findIndex((count, i) => count > before[i]!)
    },
    url
  }
}

t.test('idle nodes take turns, whatever the policy, with prompts that are not worth keeping', async t => {
  for (const policy of ['least-tokens', 'prefix', 'session'] as const) {
    const { ask } = await gatewayWith(t, { policy })
    const asked = []
    for (let i = 0; i < 2 * NODES; i++) asked.push(await ask(chat('hello')))
    t.strictSame(asked, [0, 1, 2, 3, 0, 1, 2, 3], policy)
  }
})

t.test('turns are counted by node: text and pictures in turn do not starve one', async t => {
  const { ask, counts } = await gatewayWith(t, { policy: 'least-tokens' })
  for (let i = 0; i < 2 * NODES; i++) await ask(i % 2 === 0 ? chat('hello') : chat('what?', pictureUrl(i)))
  t.strictSame(counts(), [2, 2, 2, 2])
})

t.test('a stream counts until its last byte', async t => {
  const { nodes, url, ask } = await gatewayWith(t, { policy: 'least-tokens' })
  nodes[0]!.generateFaults.push('pause')
  const stream = await post(`${url}/v1/chat/completions`, { ...chat('hello'), stream: true })
  const reader = stream.body!.getReader()
  await reader.read()
  const asked = []
  for (let i = 0; i < 6; i++) asked.push(await ask(chat('hello')))
  t.notOk(asked.includes(0), String(asked))
  await reader.cancel()
})

t.test('the turns of a conversation go to one node, in every API and spelling', async t => {
  const { ask, counts } = await gatewayWith(t, { policy: 'prefix' })
  const pick = seeded(7)
  const system = { role: 'system', content: words(0, 2_000) }
  const turn = (i: number, n: number): object => ({ role: n % 2 === 0 ? 'user' : 'assistant', content: words(i * 100 + n, 60) })
  for (let i = 0; i < MANY; i++) {
    const own = [[], [system], [{ ...system, role: 'developer' }, system], [{ content: [{ type: 'text', text: words(1, 300) }], role: 'system' }]][i % 4]!
    const kind = pick(3)
    const body = (turns: number): object => {
      const messages = [...own, ...Array.from({ length: turns }, (_, n) => turn(i, n))]
      return kind === 0 ? { model: 'vlm', messages } : kind === 1 ? { model: 'vlm', max_tokens: 5, messages } : { stream: false, input: messages, model: 'vlm' }
    }
    const path = ['/v1/chat/completions', '/v1/messages?beta=true', '/v1/responses'][kind]!
    const asked = []
    for (const turns of [1, 3, 5, 7]) asked.push(await ask(body(turns), { path }))
    t.equal(new Set(asked).size, 1, `${path}, system messages ${own.length}: ${String(asked)}`)
  }
  t.ok(counts().every(count => count > 0), `conversations with one system prompt are spread: ${String(counts())}`)
})

t.test('a prompt that grows stays with its node', async t => {
  const { ask } = await gatewayWith(t, { policy: 'prefix' })
  for (let i = 1; i <= 6; i++) {
    const asked = []
    for (const length of [100, 200, 400]) asked.push(await ask({ model: 'vlm', prompt: words(i, 400).split(' ').slice(0, length).join(' ') }, { path: '/v1/completions' }))
    t.equal(new Set(asked).size, 1, String(asked))
  }
})

t.test('conversations about a picture go to the node that has it', async t => {
  const { ask, counts } = await gatewayWith(t, { policy: 'prefix' })
  for (let i = 0; i < MANY; i++) {
    const asked = []
    for (const text of ['What is this?', 'Where?', words(i, 100)]) asked.push(await ask(chat(text, pictureUrl(i))))
    const system = { role: 'system', content: words(i, 100) }
    asked.push(await ask({ model: 'vlm', messages: [system, ...chat('And now?', pictureUrl(i)).messages, { role: 'assistant', content: 'Yes' }, ...chat('And this?', pictureUrl(99)).messages] }))
    t.equal(new Set(asked).size, 1, String(asked))
  }
  t.ok(counts().every(count => count > 0), String(counts()))
})

t.test('a session is what the client says it is', async t => {
  const { ask, counts } = await gatewayWith(t, { policy: 'session' })
  for (let i = 0; i < MANY; i++) {
    const asked = []
    asked.push(await ask(chat(words(i, 90)), { headers: { 'x-session-id': `s${i}` } }))
    asked.push(await ask({ ...chat('hello'), prompt_cache_key: `s${i}` }))
    asked.push(await ask({ ...chat(words(i + 1, 200)), user: `s${i}` }))
    asked.push(await ask({ ...chat('hello'), user: 'all' }, { headers: { 'x-session-id': `s${i}` } }))
    t.equal(new Set(asked).size, 1, String(asked))
  }
  t.ok(counts().every(count => count > 0), String(counts()))
})

t.test('a key that is none is no key', async t => {
  const { ask } = await gatewayWith(t, { policy: 'session' })
  const asked = []
  for (const more of [{ user: '' }, { user: null }, { user: 7 }, { user: {} }]) asked.push(await ask({ ...chat('hello'), ...more }))
  t.strictSame(asked, [0, 1, 2, 3])
})

t.test('a conversation leaves a node that has too much to do', async t => {
  const { nodes, url, counts } = await gatewayWith(t, { policy: 'prefix', nodeTokens: 1_000 })
  for (const node of nodes) node.generateFaults.push(...Array.from({ length: 20 }, () => 'pause' as const))
  const clients = Array.from({ length: 20 }, () => new AbortController())
  await Promise.all(clients.map(async ({ signal }) => {
    const stream = await post(`${url}/v1/chat/completions`, { ...chat(words(1, 200)), stream: true }, { signal })
    await stream.body!.getReader().read()
  }))
  t.ok(Math.max(...counts()) <= 1 + 1.25 * clients.length / NODES, String(counts()))
  for (const client of clients) client.abort()
})
