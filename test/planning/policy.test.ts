/** Option `routing.policy` through a gateway: the function that docs/options.md shows, and what a policy may return. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { packageRoot } from '../helper/package-root.ts'
import type { Policy, PolicyRequest } from '../../plugin/index.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'

/** The example of docs/options.md. */
async function documented (): Promise<Policy> {
  const page = await readFile(join(packageRoot(), 'docs', 'options.md'), 'utf8')
  const code = /^```js\n(export function policy[\s\S]*?)^```/m.exec(page)![1]!
  return (await import(`data:text/javascript,${encodeURIComponent(code)}`) as { policy: Policy }).policy
}

/** Two hybrids, the second one four times as fast, and two encoders behind a gateway with this policy. */
async function gatewayWith (t: Test, policy: Policy) {
  const nodes = [await FakeNode.start(t), await FakeNode.start(t), await FakeNode.start(t, { role: 'encoder' }), await FakeNode.start(t, { role: 'encoder' })] as const
  const [small, large, e1, e2] = nodes
  const { url } = await buildGateway(t, { nodes, options: { nodes: [small.spec, { ...large.spec, speed: 4 }, e1.spec, e2.spec], bypass: 'never', routing: { policy } } })
  const ask = async (text: string, ...pictures: string[]): Promise<Response> => {
    const response = await post(`${url}/v1/chat/completions`, chat(text, ...pictures))
    t.equal(response.status, 200, await response.text())
    return response
  }
  return { small, large, e1, e2, ask }
}

t.test('the documented policy sends long prompts to the fast node and short ones to the others', async t => {
  const { small, large, ask } = await gatewayWith(t, await documented())
  await ask('short')
  t.strictSame([small.generations.length, large.generations.length], [1, 0])
  await ask('long '.repeat(10_000))
  t.strictSame([small.generations.length, large.generations.length], [1, 1])
})

t.test('a policy orders encoders for each media item, and language models', async t => {
  const asked: PolicyRequest[] = []
  let first = ''
  const { e1, e2, large, small, ask } = await gatewayWith(t, (candidates, request) => {
    asked.push(request)
    // An encoder that it leaves out is still there as the second choice.
    return request.stage === 'encode' ? candidates.filter(node => node.id === first) : [...candidates].sort((a, b) => a.speed - b.speed)
  })
  for (const encoder of [e1, e2]) {
    first = encoder.url
    const response = await ask('which?', pictureUrl(1), pictureUrl(2))
    t.equal(response.headers.get('x-epd-encoders'), `${first},${first}`)
    t.equal(response.headers.get('x-epd-reason'), '2 items on 1 encoder')
  }
  first = 'http://not-a-candidate'
  t.equal((await ask('none', pictureUrl(3))).headers.get('x-epd-plan'), 'e-pd')
  t.strictSame([small.generations.length, large.generations.length], [3, 0])
  t.match(asked.filter(({ stage }) => stage === 'encode')[1], { model: 'vlm', media: { length: 2 }, item: { index: 1 }, promptTokens: Number })
})

t.test('nodes that have failed the request come last, whatever the policy prefers', async t => {
  const { small, large, ask } = await gatewayWith(t, candidates => [...candidates].sort((a, b) => a.speed - b.speed))
  // A kept connection that is reset is tried once more on a fresh one.
  small.generateFaults.push('reset', 'reset')
  await ask('hello')
  t.strictSame([small.generations.length, large.generations.length], [2, 1])
})
