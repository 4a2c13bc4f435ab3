import { once } from 'node:events'
import { fork } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { drawScene } from '../helper/scenes.ts'
import { forkOptions } from '../helper/node-command.ts'
import { until } from '../helper/until.ts'
import { FlakyProxy } from '../p2p/flaky-proxy.ts'
import { ask, askByEncoder, checkIdle, encode, endpointOf, events, failure, link, pictureParts, send, startEncoder, startLlm, user, withResults } from './harness.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const QUESTION = 'Describe the picture.'

const [encoder, engine] = await Promise.all([startEncoder(t, { leaseMs: 60_000 }), startLlm(t, { vision: false })])

t.test('one encoder, one engine', async t => {
  const [one, two] = await Promise.all([drawScene(1), drawScene(2)])
  const greedy = { temperature: 0, max_tokens: 48 }

  await t.test('without a link the answer is not_linked, and nothing stays behind but the lease the gateway releases', async t => {
    const results = await encode(encoder, [one])
    t.match(await failure(ask(engine, withResults(results, QUESTION, greedy))), { status: 409, code: 'not_linked' })
    for (const { remote_session_id: id } of results) encoder.endSession(id)
    await checkIdle(t, engine, encoder)
  })

  await link(engine, encoder)

  await t.test('features are pulled, ACKed and read; usage says how many tokens were pictures', async t => {
    const answer = await askByEncoder(encoder, engine, [one], QUESTION, greedy)
    const entries = await encode(encoder, [one])
    t.equal(answer.usage.prompt_tokens_details.image_tokens, entries[0]?.num_tokens)
    t.equal(engine.counters.migratedBytes, entries[0]!.num_tokens * entries[0]!.hidden_size * 4, 'no byte beyond the features')
    await until(() => encoder.counters.acks === 1, 'the ACK has arrived')
    for (const { remote_session_id: id } of entries) encoder.endSession(id)
    await checkIdle(t, engine, encoder)
  })

  await t.test('features of another picture under the right lease change the answer', async t => {
    const right = await askByEncoder(encoder, engine, [one], QUESTION, greedy)
    const other = await askByEncoder(encoder, engine, [two], QUESTION, greedy)
    t.not(right.choices[0]?.message.content, other.choices[0]?.message.content)
    const both = await askByEncoder(encoder, engine, [one, two], QUESTION, greedy)
    const swapped = await encode(encoder, [two, one])
    const answer = await ask(engine, withResults([swapped[1]!, swapped[0]!], QUESTION, greedy))
    t.equal(answer.choices[0]?.message.content, both.choices[0]?.message.content, 'the lease in the URL decides, not the order of the results')
    await checkIdle(t, engine, encoder)
  })

  await t.test('the same picture twice in one request, and several choices, are pulled once', async t => {
    const before = engine.counters.migratedBytes
    const results = await encode(encoder, [one, one])
    const answer = await ask(engine, withResults(results, QUESTION, { ...greedy, n: 3 }))
    t.equal(answer.choices.length, 3)
    t.equal(new Set(answer.choices.map(choice => choice.message.content)).size, 1)
    t.equal(engine.counters.migratedBytes - before, results[0]!.num_tokens * 256 * 4)
    await checkIdle(t, engine, encoder)
  })

  await t.test('encoder results that can\'t be right are refused before anything is pulled, naming the field', async t => {
    const results = await encode(encoder, [one])
    const [good] = results as [EncoderResultWire]
    const changed = (change: object): object => ({ ...withResults(results, QUESTION), encoder_result: [{ ...good, ...change }] })
    const cases: Array<[object, number, string, string]> = [
      [changed({ hidden_size: 1024 }), 409, 'wrong_model', 'encoder_result[0].hidden_size'],
      [changed({ dtype: 'float16' }), 409, 'wrong_model', 'encoder_result[0].dtype'],
      [changed({ grid: [7, 9] }), 409, 'wrong_model', 'encoder_result[0].grid'],
      [changed({ num_tokens: 0 }), 400, 'invalid_request', 'encoder_result[0].num_tokens'],
      [changed({ remote_block_ids: [1] }), good.remote_block_ids.length === 1 ? 410 : 400, good.remote_block_ids.length === 1 ? 'features_gone' : 'invalid_request', 'encoder_result[0].remote_block_ids'],
      [changed({ remote_block_ids: 'x' }), 400, 'invalid_request', 'encoder_result[0].remote_block_ids'],
      [changed({ lease: 'other' }), 400, 'invalid_request', 'messages[0].content[0]'],
      [changed({ epoch: -1 }), 400, 'invalid_request', 'encoder_result[0].epoch'],
      [changed({ content_hash: 7 }), 400, 'invalid_request', 'encoder_result[0].content_hash'],
      [changed({ modality: 'audio' }), 400, 'invalid_request', 'encoder_result[0].modality'],
      [changed({ protocol: 2 }), 400, 'invalid_request', 'encoder_result[0].protocol'],
      [{ ...withResults(results, QUESTION), encoder_result: 'no' }, 400, 'invalid_request', 'encoder_result'],
      [{ ...withResults(results, QUESTION), encoder_result: [null] }, 400, 'invalid_request', 'encoder_result[0]'],
      [{ ...withResults(results, QUESTION), encoder_result: [] }, 400, 'invalid_request', 'encoder_result'],
      [{ ...withResults(results, QUESTION), encoder_result: undefined }, 400, 'invalid_request', 'messages[0].content[0]'],
      [{ ...withResults([good, good], QUESTION), encoder_result: [good, good] }, 400, 'invalid_request', 'encoder_result[1].lease'],
      [{ ...withResults(results, QUESTION), migration_request: { protocol: 1 } }, 400, 'invalid_request', 'migration_request'],
      [{ messages: [user(pictureParts([one], QUESTION))], encoder_result: results }, 400, 'invalid_request', 'messages[0].content[0]']
    ]
    for (const [body, status, code, param] of cases) t.match(await failure(ask(engine, body)), { status, code, ...(status === 410 ? {} : { param }) }, param)
    t.match(await failure(ask(engine, changed({ remote_engine_id: 'http://nobody' }))), { status: 409, code: 'not_linked' })
    t.match(await failure(ask(engine, changed({ epoch: good.epoch + 1 }))), { status: 410, code: 'features_gone' })
    t.match(await failure(ask(engine, { ...withResults([{ ...good, lease: 'ffffffffffffffff' }], QUESTION) })), { status: 410, code: 'features_gone' })
    t.match(await failure(ask(engine, { messages: [user(pictureParts([one], QUESTION))] })), { status: 400, code: 'unsupported', param: 'messages[0].content[0]' })
    t.equal((await ask(engine, withResults(results, QUESTION, greedy))).choices.length, 1, 'after all that the engine serves the good one')
    await checkIdle(t, engine, encoder)
  })

  await t.test('a lease that has ended is features_gone, in a stream too before anything was sent', async t => {
    const results = await encode(encoder, [two])
    for (const { remote_session_id: id } of results) encoder.endSession(id)
    t.match(await failure(send(engine, withResults(results, QUESTION, { stream: true }))), { status: 410, code: 'features_gone' })
    await checkIdle(t, engine, encoder)
  })

  await t.test('what is cancelled at any moment leaves nothing behind', async t => {
    const requests = FULL ? 500 : 30
    let random = 12345
    const below = (n: number): number => { random = (Math.imul(random, 1103515245) + 12345) >>> 0; return (random >>> 8) % n }
    const pictures = await Promise.all([11, 12, 13, 14, 15, 16].map(seed => drawScene(seed)))
    let memory = 0
    let cancelled = 0
    const one = async (i: number): Promise<void> => {
      const stop = new AbortController()
      if (i % 3 === 0) setTimeout(() => stop.abort(), below(120))
      const urls = Array.from({ length: below(4) }, () => pictures[below(pictures.length)] as string)
      let results: EncoderResultWire[] = []
      try {
        results = urls.length === 0 ? [] : await encode(encoder, urls, { signal: stop.signal })
        const body = results.length === 0 ? { messages: [user('How are you?')] } : withResults(results, QUESTION)
        await events(await send(engine, { ...body, temperature: 0, max_tokens: 1 + below(40), stream: true }, { signal: stop.signal }))
      } catch (err) {
        if (!stop.signal.aborted) throw err
        cancelled++
      } finally {
        // As the gateway does for every lease without an ACK.
        for (const { remote_session_id: id } of results) encoder.endSession(id)
      }
    }
    for (let i = 0; i < requests; i += 10) {
      if (i % 30 === 0) engine.clearCache()
      await Promise.all(Array.from({ length: 10 }, (_, k) => one(i + k)))
      if (i === Math.floor(requests / 20) * 10) memory = process.memoryUsage().rss
    }
    t.ok(cancelled > 0, `${cancelled} of ${requests} were cancelled; every other one was answered`)
    const grown = (process.memoryUsage().rss - memory) / 2 ** 20
    t.ok(grown < 100, `memory is flat: ${grown.toFixed(1)} MiB over the second half`)
    await checkIdle(t, engine, encoder)
  })
})

t.test('a flipped byte fails the request, and the engine goes on', async t => {
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
  t.ok((engine.gauges().epd_feature_blocks_free ?? 0) < (engine.gauges().epd_feature_blocks_capacity ?? 0), 'its blocks are held while they may be written')
  stop.abort()
  t.match(await call, { status: 499, code: 'cancelled' })
  await checkIdle(t, engine)
  for (const { remote_session_id: id } of stuck) encoder.endSession(id)

  await engine.p2p.drop(endpoint.engine)
  proxy.arm({ kind: 'none' })
  await link(engine, encoder)
  t.ok((await askByEncoder(encoder, engine, [url], QUESTION, { temperature: 0 })).choices[0]?.message.content)
  await checkIdle(t, engine, encoder)
})

t.test('an encoder that dies before the pull is features_gone; one that starts again is another', async t => {
  const encoder = await startEncoder(t, { engineId: 'http://encoder-same' })
  await link(engine, encoder)
  const url = await drawScene(4)
  const results = await encode(encoder, [url])
  await encoder.close()
  t.match(await failure(ask(engine, withResults(results, QUESTION))), { status: 410, code: 'features_gone' })
  const next = await startEncoder(t, { engineId: 'http://encoder-same' })
  await link(engine, next)
  t.match(await failure(ask(engine, withResults(results, QUESTION))), { status: 410, code: 'features_gone' }, 'old results name the old epoch')
  t.ok(await askByEncoder(next, engine, [url], QUESTION, { max_tokens: 4 }))
  await checkIdle(t, engine, next)
})

t.test('an engine killed with -9 in mid-migration leaves the encoder clean, and serves when started again', async t => {
  const { proxy, endpoint } = await FlakyProxy.before(endpointOf(encoder))
  t.teardown(() => proxy.close())
  const url = await drawScene(5)
  const spawn = (): ReturnType<typeof fork> => {
    const child = fork(fileURLToPath(new URL('./engine-child.js', import.meta.url)), forkOptions())
    t.teardown(() => { child.kill('SIGKILL') })
    return child
  }
  const tell = async (child: ReturnType<typeof fork>, message: object): Promise<Record<string, unknown>> => {
    const answer = once(child, 'message')
    child.send(message)
    return (await answer)[0] as Record<string, unknown>
  }
  const victim = spawn()
  await tell(victim, { op: 'open', endpoint })
  const results = await encode(encoder, [url])
  proxy.arm({ kind: 'stall', at: 9000 })
  victim.send({ op: 'ask', body: withResults(results, QUESTION) })
  await until(() => proxy.passed > 9000, 'the pull is under way')
  const dead = once(victim, 'exit')
  victim.kill('SIGKILL')
  await dead
  // The gateway sees the call fail and releases the leases without an ACK.
  for (const { remote_session_id: id } of results) encoder.endSession(id)
  await checkIdle(t, encoder)

  const child = spawn()
  await tell(child, { op: 'open', endpoint: endpointOf(encoder) })
  const answer = await tell(child, { op: 'ask', body: withResults(await encode(encoder, [url]), QUESTION) })
  t.match(answer, { status: 200 })
  const { gauges } = await tell(child, { op: 'gauges' }) as { gauges: Record<string, number> }
  t.equal(gauges.epd_feature_blocks_free! + gauges.epd_feature_blocks_cached!, gauges.epd_feature_blocks_capacity)
  t.equal(gauges.epd_kv_blocks_free! + gauges.epd_kv_blocks_cached!, gauges.epd_kv_blocks_capacity)
  const exit = once(child, 'exit')
  child.send({ op: 'close' })
  t.same(await exit, [0, null])
  await checkIdle(t, encoder)
})
