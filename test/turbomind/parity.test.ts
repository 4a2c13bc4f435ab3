import t from 'tap'
import { ask, checkIdle, encode, link, startEncoder, startLlm, user, withResults, type Completion } from '../llm/harness.ts'
import { bodyOf, mixedRequests, outcome, type MixedRequest } from '../llm/mixed-requests.ts'
import { startTurbomind } from './harness.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const REQUESTS = FULL ? 100 : 10
const DISTINCT_PICTURES = FULL ? 24 : 5

t.test('greedy answers are those of the PyTorch-like engine: by itself and behind an encoder, alone or batched, in chunks, fresh or from kept slots', async t => {
  const requests = await mixedRequests(REQUESTS, DISTINCT_PICTURES)
  const pytorch = await startLlm(t)
  const expected = await Promise.all(requests.map(async request => outcome(await ask(pytorch, bodyOf(request)))))
  t.ok(new Set(expected).size > REQUESTS / 3, 'the answers differ from each other')
  await checkIdle(t, pytorch)

  await t.test('hybrid by itself, one request after the other and all at once', async t => {
    const engine = await startTurbomind(t, { maxBatchSize: 6 })
    const alone: string[] = []
    for (const request of requests) alone.push(outcome(await ask(engine, bodyOf(request))))
    t.same(alone, expected)
    const together = await Promise.all(requests.map(async request => outcome(await ask(engine, bodyOf(request)))))
    t.same(together, expected)
    await checkIdle(t, engine)
  })

  await t.test('E -> TurboMind in chunks of 24 tokens, with fewer slots than requests, then once more with what the slots keep', async t => {
    const encoder = await startEncoder(t)
    const engine = await startTurbomind(t, { vision: false, maxBatchSize: 4, kvBlocks: 6, maxPrefillTokens: 24 })
    await link(engine, encoder)
    const viaEncoder = async ({ urls, text, more }: MixedRequest): Promise<Completion> => {
      if (urls.length === 0) return await ask(engine, { messages: [user(text)], ...more })
      return await ask(engine, withResults(await encode(encoder, urls), text, more))
    }
    t.same((await Promise.all(requests.map(viaEncoder))).map(outcome), expected)
    t.ok(engine.counters.migratedBytes > 0)
    const again = await Promise.all(requests.map(viaEncoder))
    t.same(again.map(outcome), expected)
    t.ok(again.some(answer => answer.usage.prompt_tokens_details.cached_tokens > 0), 'slots were found again')
    await checkIdle(t, encoder, engine)
  })
})
