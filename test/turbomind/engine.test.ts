import t from 'tap'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'
import { ask, askByEncoder, checkIdle, encode, endpointOf, events, failure, link, pictureParts, send, startEncoder, startLlm, user, withResults, type Completion } from '../llm/harness.ts'
import { FlakyProxy } from '../p2p/flaky-proxy.ts'
import { startTurbomind } from './harness.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const QUESTION = 'Describe the picture.'
const greedy = { temperature: 0, max_tokens: 48 }
const text = (answer: Completion): string | undefined => answer.choices[0]?.message.content
const cached = (answer: Completion): number => answer.usage.prompt_tokens_details.cached_tokens

t.test('by itself', async t => {
  const engine = await startTurbomind(t, { maxBatchSize: 2, sessionLen: 300 })
  const [one, two] = await Promise.all([drawScene(1), drawScene(2)])

  await t.test('it says what it is', async t => {
    t.match(engine.info(), {
      backend: 'turbomind', role: 1, vision: 'full', block_size: 300, num_gpu_blocks: 2, produces: [], accepts: ['features:epd-zmq/1'], kv: { slots: 2, session_len: 300 }, feature: { block_tokens: 32 }
    })
    t.match(engine.gauges(), { epd_kv_blocks_capacity: 2, epd_kv_blocks_free: 2 })
    t.equal(endpointOf(engine).pools.kv, undefined, 'no engine can pull its KV')
    await t.rejects(startTurbomind(t, { role: 'prefill' }), { code: 'unsupported', message: /no role prefill/ })
  })

  await t.test('the next turn of a conversation finds its slot, pictures included', async t => {
    const conversation: object[] = [user(pictureParts([one], 'How many shapes are there?'))]
    const first = await ask(engine, { ...greedy, messages: conversation })
    t.equal(cached(first), 0)
    conversation.push({ role: 'assistant', content: text(first) }, user('What colour is the first of them?'))
    const second = await ask(engine, { ...greedy, messages: conversation })
    t.equal(cached(second), first.usage.total_tokens - 1, 'all of the first turn but its last token')
    const other = await ask(engine, { ...greedy, messages: [user(pictureParts([two], 'How many shapes are there?')), ...conversation.slice(1)] })
    t.equal(cached(other), 0, 'the same words about another picture')
    t.match(engine.gauges(), { epd_kv_blocks_free: 0, epd_kv_blocks_cached: 2 })
    await ask(engine, { ...greedy, messages: [user('How are you?')] })
    const late = await ask(engine, { ...greedy, messages: conversation })
    t.equal(cached(late), 0, 'its slot was the one used least recently')
    t.equal(text(late), text(second))
    await checkIdle(t, engine)
  })

  await t.test('a prompt longer than a slot is refused, an answer ends where the slot ends', async t => {
    t.match(await failure(ask(engine, { messages: [user('word '.repeat(400))] })), { status: 400, code: 'context_length_exceeded' })
    const long = await ask(engine, { temperature: 0, ignore_eos: true, max_tokens: 1000, messages: [user('How are you?')] })
    t.equal(long.choices[0]?.finish_reason, 'length')
    t.equal(long.usage.total_tokens, 300)
    await checkIdle(t, engine)
  })

  await t.test('several choices, completions, streams and log probabilities go the same way as in the PyTorch-like engine', async t => {
    const pytorch = await startLlm(t)
    const bodies = [
      { ...greedy, n: 3, messages: [user(pictureParts([one], QUESTION))] },
      { temperature: 0.8, seed: 7, n: 2, messages: [user(pictureParts([one, two], QUESTION))] },
      { ...greedy, logprobs: true, messages: [user('How are you?')] },
      { ...greedy, stop: ['am'], messages: [user('How are you?')] }
    ]
    for (const body of bodies) {
      const [a, b] = await Promise.all([ask(engine, body), ask(pytorch, body)])
      t.same(a.choices.map(choice => [choice.message.content, choice.finish_reason, choice.logprobs?.content.map(entry => entry.token)]),
        b.choices.map(choice => [choice.message.content, choice.finish_reason, choice.logprobs?.content.map(entry => entry.token)]))
    }
    const completion = await send(engine, { ...greedy, prompt: ['How are', 'One'] }, {}, 'completions') as { json: { choices: unknown[] } }
    t.equal(completion.json.choices.length, 2)
    t.equal((await events(await send(engine, { ...greedy, stream: true, messages: [user('How are you?')] }))).at(-1), '[DONE]')
    await checkIdle(t, engine, pytorch)
  })
})

const [encoder, engine] = await Promise.all([startEncoder(t), startTurbomind(t, { vision: false, maxBatchSize: 4 })])

t.test('behind an encoder', async t => {
  const pictures = await Promise.all([1, 2, 3, 4].map(seed => drawScene(seed)))
  const [one, two] = pictures as [string, string, string, string]

  await t.test('without a link the answer is not_linked', async t => {
    const results = await encode(encoder, [one])
    t.match(await failure(ask(engine, withResults(results, QUESTION))), { status: 409, code: 'not_linked' })
    for (const { remote_session_id: id } of results) encoder.endSession(id)
    await checkIdle(t, engine, encoder)
  })

  await link(engine, encoder)

  await t.test('the shim pulls each lease once, ACKs it, and gives the staging blocks back at once', async t => {
    const results = await encode(encoder, [one, two])
    const { migratedBytes } = engine.counters
    const acks = encoder.counters.acks
    const answer = await ask(engine, withResults(results, QUESTION, { ...greedy, n: 12 }))
    t.equal(new Set(answer.choices.map(choice => choice.message.content)).size, 1)
    t.equal(engine.counters.migratedBytes - migratedBytes, (results[0]!.num_tokens + results[1]!.num_tokens) * results[0]!.hidden_size * 4, 'no byte beyond the features, whatever the number of choices')
    await until(() => encoder.counters.acks === acks + 2, 'both leases are ACKed')
    t.match(engine.gauges(), { epd_feature_blocks_free: engine.gauges().epd_feature_blocks_capacity, epd_feature_blocks_cached: 0 })
    t.equal(answer.usage.prompt_tokens_details.image_tokens, results[0]!.num_tokens + results[1]!.num_tokens)
    await checkIdle(t, engine, encoder)
  })

  await t.test('the lease in the URL decides which picture it is', async t => {
    const right = text(await askByEncoder(encoder, engine, [one], QUESTION, greedy))
    t.not(right, text(await askByEncoder(encoder, engine, [two], QUESTION, greedy)))
    await checkIdle(t, engine, encoder)
  })

  await t.test('a lease that has ended, or of another process, is features_gone', async t => {
    const results = await encode(encoder, [one])
    for (const { remote_session_id: id } of results) encoder.endSession(id)
    t.match(await failure(send(engine, withResults(results, QUESTION, { stream: true, n: 2 }))), { status: 410, code: 'features_gone' })
    const fresh = await encode(encoder, [one])
    t.match(await failure(ask(engine, withResults([{ ...fresh[0]!, epoch: fresh[0]!.epoch + 1 }], QUESTION))), { status: 410, code: 'features_gone' })
    t.match(await failure(ask(engine, { messages: [user(pictureParts([one], QUESTION))] })), { status: 400, code: 'unsupported', param: 'messages[0].content[0]' })
    t.match(await failure(ask(engine, { ...withResults(fresh, QUESTION), encoder_result: [] })), { status: 400, code: 'invalid_request' })
    for (const { remote_session_id: id } of fresh) encoder.endSession(id)
    await checkIdle(t, engine, encoder)
  })

  await t.test('pictures pass through a staging pool that holds one of them at a time', async t => {
    const [, , large, small] = pictures as [string, string, string, string]
    const narrow = await startTurbomind(t, { vision: false, featureBlocks: 2 })
    await link(narrow, encoder)
    const three = [one, two, small]
    const expected = text(await askByEncoder(encoder, engine, three, QUESTION, greedy))
    const answers = await Promise.all([1, 2, 3].map(async () => text(await askByEncoder(encoder, narrow, three, QUESTION, greedy))))
    t.same(new Set(answers), new Set([expected]))
    const results = await encode(encoder, [large])
    t.equal(results[0]?.remote_block_ids.length, 3)
    t.match(await failure(ask(narrow, withResults(results, QUESTION))), { status: 400, code: 'invalid_request', param: 'encoder_result' }, 'one that can never fit does not wait')
    for (const { remote_session_id: id } of results) encoder.endSession(id)
    await checkIdle(t, engine, encoder, narrow)
  })

  await t.test('what is cancelled at any moment leaves nothing behind', async t => {
    const requests = FULL ? 500 : 30
    let random = 12345
    const below = (n: number): number => { random = (Math.imul(random, 1103515245) + 12345) >>> 0; return (random >>> 8) % n }
    let cancelled = 0
    const request = async (i: number): Promise<void> => {
      const stop = new AbortController()
      if (i % 3 === 0) setTimeout(() => stop.abort(), below(120))
      const urls = Array.from({ length: below(4) }, () => pictures[below(pictures.length)] as string)
      let results: EncoderResultWire[] = []
      try {
        results = urls.length === 0 ? [] : await encode(encoder, urls, { signal: stop.signal })
        const body = results.length === 0 ? { messages: [user('How are you?')] } : withResults(results, QUESTION)
        await events(await send(engine, { ...body, temperature: 0, max_tokens: 1 + below(30), n: 1 + below(2), stream: true }, { signal: stop.signal }))
      } catch {
        cancelled++
      } finally {
        for (const { remote_session_id: id } of results) encoder.endSession(id)
      }
    }
    for (let i = 0; i < requests; i += 10) await Promise.all(Array.from({ length: 10 }, (_, k) => request(i + k)))
    t.ok(cancelled > 0 && cancelled <= requests / 2, `${cancelled} of ${requests} were cancelled`)
    await checkIdle(t, engine, encoder)
  })
})

t.test('a flipped byte is features_corrupt, a pull that stalls can be cancelled, and the engine goes on', async t => {
  const { proxy, endpoint } = await FlakyProxy.before(endpointOf(encoder))
  t.teardown(() => proxy.close())
  await engine.p2p.drop(endpoint.engine)
  await engine.p2p.connect(endpoint)
  const url = await drawScene(3)
  const results = await encode(encoder, [url])
  proxy.arm({ kind: 'flip', at: 9000 })
  t.match(await failure(ask(engine, withResults(results, QUESTION))), { status: 502, code: 'features_corrupt' })
  await checkIdle(t, engine)
  for (const { remote_session_id: id } of results) encoder.endSession(id)

  await engine.p2p.drop(endpoint.engine)
  await engine.p2p.connect(endpoint)
  const stuck = await encode(encoder, [url])
  proxy.arm({ kind: 'stall', at: 9000 })
  const stop = new AbortController()
  const call = failure(ask(engine, withResults(stuck, QUESTION), { signal: stop.signal }))
  await until(() => proxy.passed > 9000, 'the pull is under way')
  t.equal(engine.sequences().EPD_MIGRATION_LOCKED, 1)
  t.ok((engine.gauges().epd_feature_blocks_free ?? 0) < (engine.gauges().epd_feature_blocks_capacity ?? 0), 'it lands in staging blocks')
  stop.abort()
  t.match(await call, { status: 499, code: 'cancelled' })
  await checkIdle(t, engine)
  for (const { remote_session_id: id } of stuck) encoder.endSession(id)

  await engine.p2p.drop(endpoint.engine)
  proxy.arm({ kind: 'none' })
  await link(engine, encoder)
  t.ok(text(await askByEncoder(encoder, engine, [url], QUESTION, greedy)))
  await encoder.close()
  const again = await startEncoder(t, { engineId: endpoint.engine })
  await link(engine, again)
  t.match(await failure(ask(engine, withResults(stuck, QUESTION))), { status: 410, code: 'features_gone' }, 'results of the process before')
  t.ok(text(await askByEncoder(again, engine, [url], QUESTION, greedy)))
  await checkIdle(t, engine, again)
})
