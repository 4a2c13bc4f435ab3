import t from 'tap'
import { openTinyModel } from '../helper/tiny-model.ts'
import { ask, checkIdle, encode, link, startEncoder, startLlm, user, withResults, type Completion } from './harness.ts'
import { bodyOf as body, mixedRequests, outcome, type MixedRequest } from './mixed-requests.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const REQUESTS = FULL ? 64 : 10
const DISTINCT_PICTURES = FULL ? 24 : 5

t.test('greedy answers are the same alone or batched, whole or in chunks, encoded here or at E, cached or fresh, evicted or not', async t => {
  const requests = await mixedRequests(REQUESTS, DISTINCT_PICTURES)
  const hybrid = await startLlm(t, {}, { prefixCaching: false, maxPrefillTokens: 4096 })
  const expected: string[] = []
  for (const request of requests) expected.push(outcome(await ask(hybrid, body(request))))
  // Six of nine blocks each do not fit into 38.
  const growing = Array.from({ length: 6 }, (_, i) => ({ urls: [], text: `Tell me about number ${i}.`, more: { temperature: 0, ignore_eos: true, max_tokens: 125 } }))
  const grown = await Promise.all(growing.map(async request => outcome(await ask(hybrid, body(request)))))
  t.ok(new Set(expected).size > REQUESTS / 3, 'the answers differ from each other')

  await t.test('batched together, encoded by the engine itself', async t => {
    const together = await Promise.all(requests.map(async request => outcome(await ask(hybrid, body(request)))))
    t.same(together, expected)
    await checkIdle(t, hybrid)
  })

  await t.test('E -> PD, in small chunks, with so few blocks that sequences are evicted, and once more with everything cached', async t => {
    const encoder = await startEncoder(t)
    const engine = await startLlm(t, { vision: false, kvBlocks: 38, maxBatchSize: 12 }, { maxPrefillTokens: 24 })
    await link(engine, encoder)
    const viaEncoder = async ({ urls, text, more }: MixedRequest): Promise<Completion> => {
      if (urls.length === 0) return await ask(engine, { messages: [user(text)], ...more })
      return await ask(engine, withResults(await encode(encoder, urls), text, more))
    }
    const fresh = await Promise.all(requests.map(viaEncoder))
    t.same(fresh.map(outcome), expected)
    t.same((await Promise.all(growing.map(viaEncoder))).map(outcome), grown, 'answers that outgrow the pool together')
    const { evictions } = engine.runtime!.engine
    t.ok(evictions > 0, `${evictions} evictions`)
    t.ok(engine.counters.migratedBytes > 0)
    const migrated = engine.counters.migratedBytes
    const again = await Promise.all(requests.map(viaEncoder))
    t.same(again.map(outcome), expected)
    t.equal(engine.counters.migratedBytes, migrated, 'features that are here are not pulled again')
    t.ok(again.some(answer => answer.usage.prompt_tokens_details.cached_tokens > 0), 'and prefixes are found')
    await checkIdle(t, encoder, engine)
  })

  await t.test('and they are what the graphs give when run the plain way', async t => {
    const plain = await openTinyModel()
    t.teardown(() => plain.close())
    for (const request of requests.filter(({ more }) => !('ignore_eos' in more)).slice(0, 4)) {
      const seen = await Promise.all(request.urls.map(url => plain.see(Buffer.from(url.slice(url.indexOf(',') + 1), 'base64'))))
      const content = request.urls.length === 0 ? request.text : [...request.urls.map(() => ({ type: 'image' })), { type: 'text', text: request.text }]
      t.equal(expected[requests.indexOf(request)]?.split(' tokens: ')[1], await plain.answer([{ role: 'user', content }], seen, 64))
    }
  })
})
