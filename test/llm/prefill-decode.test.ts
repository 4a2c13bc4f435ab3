import { context, propagation, ROOT_CONTEXT, trace, TraceFlags } from '@opentelemetry/api'
import { W3CTraceContextPropagator } from '@opentelemetry/core'
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-base'
import t from 'tap'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'
import {
  ask, askByPrefill, checkIdle, decodeBody, encode, events, failure, link, pictureParts, prefill, send, startEncoder, startLlm, user, withResults, type Completion
} from './harness.ts'
import { bodyOf, mixedRequests, outcome } from './mixed-requests.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const REQUESTS = FULL ? 64 : 6
const DISTINCT_PICTURES = FULL ? 24 : 4
/** Bytes of a KV block of the shipped model: 6 layers of keys and values, 2 heads of 32 numbers, 16 tokens. */
const BLOCK_BYTES = 6 * 2 * 2 * 32 * 16 * 4

/** What must be equal in two answers or streams; log probabilities but for what another batch changes in the last digits. */
function essence (value: unknown): unknown {
  return JSON.parse(JSON.stringify(value, (key, member: unknown) => {
    if (key === 'id' || key === 'created') return undefined
    return key.endsWith('logprob') && typeof member === 'number' ? Math.round(member * 100) : member
  }))
}

const [hybrid, encoder, p, d] = await Promise.all([
  startLlm(t, {}, { prefixCaching: false, maxPrefillTokens: 4096 }),
  startEncoder(t),
  startLlm(t, { role: 'prefill' }, { maxPrefillTokens: 24 }),
  startLlm(t, { role: 'decode' })
])
await link(p, encoder)
await link(d, p)

t.test('P -> D and E -> P -> D answer what a hybrid answers, and D computes no prompt, evicted or not', async t => {
  const requests = await mixedRequests(REQUESTS, DISTINCT_PICTURES)
  const expected: string[] = []
  for (const request of requests) expected.push(outcome(await ask(hybrid, bodyOf(request))))

  await t.test('P with vision weights, one after the other and all at once', async t => {
    const alone: string[] = []
    for (const request of requests) alone.push(outcome(await askByPrefill(p, d, bodyOf(request))))
    t.same(alone, expected)
    t.equal(p.runtime!.engine.steps.decodedTokens, requests.length, 'P samples one token a request')
    const together = await Promise.all(requests.map(async request => outcome(await askByPrefill(p, d, bodyOf(request)))))
    t.same(together, expected)
    t.equal(d.runtime!.engine.steps.prefilledTokens, 0)
    await until(() => p.counters.acks === 2 * requests.length, 'every lease ended by its ACK')
    await checkIdle(t, p, d)
  })

  await t.test('E -> P -> D, with so few blocks at D that sequences are spilled and restored', async t => {
    const small = await startLlm(t, { role: 'decode', kvBlocks: 38, maxBatchSize: 12 })
    await link(small, p)
    const growing = Array.from({ length: 6 }, (_, i) => ({ urls: [], text: `Tell me about number ${i}.`, more: { temperature: 0, ignore_eos: true, max_tokens: 125 } }))
    const grown = await Promise.all(growing.map(async request => outcome(await ask(hybrid, bodyOf(request)))))
    const threeStages = async (request: typeof requests[number]): Promise<string> => {
      const { urls, text, more } = request
      const body = urls.length === 0 ? bodyOf(request) : withResults(await encode(encoder, urls), text, more)
      return outcome(await askByPrefill(p, small, body))
    }
    t.same(await Promise.all(requests.map(threeStages)), expected)
    t.same(await Promise.all(growing.map(threeStages)), grown, 'answers that outgrow the pool together')
    const { evictions, steps } = small.runtime!.engine
    t.ok(evictions > 0, `${evictions} evictions`)
    t.equal(steps.prefilledTokens, 0, 'none of them was computed again')
    t.equal(small.gauges().epd_kv_blocks_spilled, 0, 'no copy is left')
    await checkIdle(t, encoder, p, small)
  })

  await t.test('sampling, stops, lengths, log probabilities and streams go on as if D had sampled the first token', async t => {
    const hello = { messages: [user('How are you?')], temperature: 0 }
    const [eos] = hybrid.model.text.eosIds as [number]
    const [first, second] = hybrid.runtime!.tokenizer.encode('I am fine, thank you.') as [number, number]
    const prompt = '<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n'
    const bodies = [
      hello,
      { ...hello, max_tokens: 1 },
      { ...hello, max_completion_tokens: 3, max_tokens: 50 },
      { ...hello, stop: ['fine'] },
      { ...hello, stop: 'I', include_stop_str_in_output: true },
      { ...hello, stop_token_ids: [first] },
      { ...hello, stop_token_ids: [second] },
      { ...hello, logit_bias: { [eos]: 100 }, logprobs: true },
      { ...hello, logit_bias: { [eos]: 100 }, min_tokens: 4, max_tokens: 20 },
      { ...hello, min_new_tokens: 12 },
      { ...hello, logprobs: true, top_logprobs: 3 },
      { ...hello, temperature: 1.5, seed: 42, max_tokens: 24, ignore_eos: true, skip_special_tokens: false },
      { ...hello, temperature: 0.9, seed: 7, top_p: 0.9, top_k: 20, min_tokens: 6, max_tokens: 24 },
      { ...hello, repetition_penalty: 1.5, presence_penalty: 1, frequency_penalty: 1, ignore_eos: true, max_tokens: 30 },
      { messages: [user(pictureParts([await drawScene(3)], 'Describe the picture.'))], temperature: 1, seed: 3, logprobs: true, max_tokens: 20 },
      { prompt, temperature: 0 },
      { prompt, temperature: 0, logprobs: 2, max_tokens: 4 },
      { prompt: hybrid.runtime!.tokenizer.encode(prompt), temperature: 1, seed: 5, max_tokens: 8 }
    ]
    for (const body of bodies) {
      const kind = 'prompt' in body ? 'completions' : 'chat'
      const name = JSON.stringify(body).slice(-90)
      const whole = (await send(hybrid, body, {}, kind) as { json: Completion }).json
      const handed = await askByPrefill(p, d, body)
      // Here the cache of the hybrid is off, that of P is on.
      handed.usage.prompt_tokens_details.cached_tokens = 0
      t.same(essence(handed), essence(whole), name)
      const streamed = { ...body, stream: true, stream_options: { include_usage: true } }
      const chunks = await events(await send(d, decodeBody(streamed, await prefill(p, streamed)), {}, kind)) as Completion[]
      chunks.at(-2)!.usage.prompt_tokens_details.cached_tokens = 0
      t.same(essence(chunks), essence(await events(await send(hybrid, streamed, {}, kind))), `streamed: ${name}`)
    }
    t.equal(d.runtime!.engine.steps.prefilledTokens, 0)
    await checkIdle(t, p, d)
  })
})

t.test('blocks that are in D\'s prefix cache are not pulled again, and the lease is ended all the same', async t => {
  const acks = p.counters.acks
  const prompt = (length: number, last = 0): number[] => [...Array.from({ length: length - 1 }, (_, i) => 300 + i % 50), 400 + last]
  const pulled = async (body: object, tenant?: string): Promise<number> => {
    const before = d.counters.migratedBytes
    await askByPrefill(p, d, { max_tokens: 2, ignore_eos: true, temperature: 0, ...body }, tenant === undefined ? {} : { tenant })
    return (d.counters.migratedBytes - before) / BLOCK_BYTES
  }
  t.equal(await pulled({ prompt: prompt(40) }), 3)
  t.equal(await pulled({ prompt: prompt(40) }), 1, 'the block that is not full has no hash')
  t.equal(await pulled({ prompt: prompt(48, 1) }), 1)
  t.equal(await pulled({ prompt: prompt(48, 1) }), 0, 'with whole blocks nothing is left to pull')
  t.equal(await pulled({ prompt: prompt(48, 2) }), 1)
  t.equal(await pulled({ prompt: prompt(48, 1) }, 'another tenant'), 3)
  const [one, two] = await Promise.all([drawScene(1), drawScene(2)])
  const picture = (url: string): object => ({ messages: [user(pictureParts([url], 'Describe the picture.'))] })
  const fresh = await pulled(picture(one))
  t.ok(fresh > 2)
  t.equal(await pulled(picture(one)), 1)
  t.ok(await pulled(picture(two)) >= fresh - 1, 'the same words about another picture')
  await until(() => p.counters.acks - acks === 9, 'all nine leases were ACKed')
  await checkIdle(t, p, d)
})

t.test('each role says what it is and takes what it should', async t => {
  const p = await startLlm(t, { role: 'prefill', vision: false })
  await link(d, p)
  t.match(p.info(), { role: 2, produces: ['kv:epd-zmq/1'], accepts: ['features:epd-zmq/1'], vision: 'features', kv: { block_tokens: 16 }, feature: { block_tokens: 32 } })
  t.match(d.info(), { role: 3, produces: [], accepts: ['kv:epd-zmq/1'], vision: 'none', feature: undefined, kv: { block_tokens: 16, layers: 6, kv_heads: 2, head_dim: 32, dtype: 'float32' } })
  t.equal(d.runtime?.vision, undefined)
  const hello = { messages: [user('How are you?')], temperature: 0 }
  const plain = await ask(d, hello)
  t.equal(plain.choices[0]?.message.content, 'I am fine, thank you.', 'a decode engine serves text by itself')
  const one = await ask(p, { ...hello, max_tokens: 20 })
  t.match(one, { choices: [{ message: { content: 'I' }, finish_reason: 'length' }], migration_request: undefined }, 'a prefill engine stops after its first token')
  t.equal(p.gauges().epd_leases_open, 0, 'and keeps nothing unless asked')

  const picture = user(pictureParts([await drawScene(1)], 'What is it?'))
  const good = await prefill(p, hello)
  const pair = { with_cache: true, preserve_cache: true }
  const refused: Array<[typeof p, object, string, string]> = [
    [d, { ...hello, messages: [picture] }, 'unsupported', 'messages[0].content[0]'],
    [d, { ...hello, encoder_result: [{}] }, 'unsupported', 'encoder_result'],
    [d, { ...decodeBody(hello, good), encoder_result: [{}] }, 'invalid_request', 'migration_request'],
    [d, { ...decodeBody(hello, good), n: 2 }, 'invalid_request', 'n'],
    [d, { ...decodeBody(hello, good), logprobs: true }, 'invalid_request', 'migration_request.first_token'],
    [d, { ...hello, ...pair }, 'unsupported', 'with_cache'],
    [p, decodeBody(hello, good), 'unsupported', 'migration_request'],
    [p, { ...hello, with_cache: true }, 'invalid_request', 'preserve_cache'],
    [p, { ...hello, preserve_cache: true }, 'invalid_request', 'with_cache'],
    [p, { ...hello, ...pair, n: 2 }, 'invalid_request', 'n'],
    [p, { ...hello, ...pair, stream: true }, 'invalid_request', 'stream'],
    [p, { ...hello, ...pair, preserve_cache: 'yes' }, 'invalid_request', 'preserve_cache'],
    [p, { ...hello, messages: [picture] }, 'unsupported', 'messages[0].content[0]'],
    [hybrid, decodeBody(hello, good), 'unsupported', 'migration_request'],
    [hybrid, { ...hello, preserve_cache: true }, 'unsupported', 'preserve_cache']
  ]
  for (const [engine, body, code, param] of refused) t.match(await failure(ask(engine, body)), { status: 400, code, param }, `${engine.role}: ${param}`)
  t.match(await failure(send(p, { prompt: ['a', 'b'], ...pair }, {}, 'completions')), { status: 400, code: 'invalid_request', param: 'prompt' })
  t.ok(await ask(d, decodeBody(hello, good)), 'and the migration request is still good')
  await checkIdle(t, p, d, hybrid)
})

t.test('a migration request that can\'t be right is refused before anything is pulled, naming the field', async t => {
  const d = await startLlm(t, { role: 'decode', kvBlocks: 40 })
  await link(d, p)
  const body = { messages: [user(pictureParts([await drawScene(1)], 'Describe the picture.'))], temperature: 0, logprobs: true, max_tokens: 4 }
  const { migration_request: good } = await prefill(p, body)
  const { token_ids: ids, media: [item], media_spans: [span] } = good
  const first = good.first_token
  const cases: Array<[object, string]> = [
    [{ protocol: 2 }, 'protocol'], [{ remote_engine_id: '' }, 'remote_engine_id'], [{ remote_engine_id: 7 }, 'remote_engine_id'], [{ epoch: -1 }, 'epoch'], [{ lease: undefined }, 'lease'],
    [{ remote_session_id: 'x' }, 'remote_session_id'], [{ remote_block_ids: 'x' }, 'remote_block_ids'], [{ remote_block_ids: [] }, 'remote_block_ids'], [{ remote_block_ids: good.remote_block_ids.map(() => 1) }, 'remote_block_ids'],
    [{ remote_block_ids: [...good.remote_block_ids, 999] }, 'remote_block_ids'], [{ remote_token_id: 10 ** 6 }, 'remote_token_id'], [{ remote_token_id: null }, 'remote_token_id'], [{ is_dummy_prefill: true }, 'is_dummy_prefill'],
    [{ token_ids: [] }, 'token_ids'], [{ token_ids: [1.5] }, 'token_ids'], [{ token_ids: [...ids.slice(1), 10 ** 6] }, 'token_ids'], [{ token_ids: Array(10 ** 5).fill(1) }, 'token_ids'],
    [{ next_position: 0 }, 'next_position'], [{ next_position: ids.length + 1 }, 'next_position'], [{ media: {} }, 'media'], [{ media: [null] }, 'media[0]'], [{ media: [{ ...item, content_hash: 7 }] }, 'media[0].content_hash'],
    [{ media: [{ ...item, num_tokens: 0 }] }, 'media[0].num_tokens'], [{ media: Array(65).fill(item) }, 'media'], [{ media_spans: 'x' }, 'media_spans'], [{ media_spans: [7] }, 'media_spans[0]'],
    [{ media_spans: [{ ...span, item: 1 }] }, 'media_spans[0].item'], [{ media_spans: [{ ...span, start: ids.length }] }, 'media_spans[0].start'], [{ media_spans: [{ ...span, length: ids.length }] }, 'media_spans[0].length'],
    [{ media_spans: [{ ...span, offset: 1 }] }, 'media_spans[0].offset'], [{ media_spans: [span, span] }, 'media_spans[1].start'], [{ cached_tokens: ids.length + 1 }, 'cached_tokens'], [{ cached_tokens: undefined }, 'cached_tokens'],
    [{ first_token: undefined }, 'first_token'], [{ first_token: { ...first, logprob: 'x' } }, 'first_token.logprob'], [{ first_token: { ...first, top: 7 } }, 'first_token.top'], [{ first_token: { ...first, top: [{ token: -1, logprob: 0 }] } }, 'first_token.top[0].token']
  ]
  for (const [change, field] of cases) {
    t.match(await failure(ask(d, decodeBody(body, { migration_request: { ...good, ...change } }))), { status: 400, code: 'invalid_request', param: `migration_request.${field}` }, `${field} ${JSON.stringify(change).slice(0, 60)}`)
  }
  for (const value of ['x', 7, [7]]) t.match(await failure(ask(d, { ...decodeBody(body, { migration_request: good }), migration_request: value })), { status: 400, code: 'invalid_request', param: 'migration_request' })
  const long = { token_ids: Array(640).fill(1), remote_block_ids: Array.from({ length: 40 }, (_, i) => i), media: [], media_spans: [] }
  t.match(await failure(ask(d, decodeBody(body, { migration_request: { ...good, ...long } }))), { status: 400, code: 'context_length_exceeded', param: 'migration_request.token_ids' }, 'no room for an answer')
  t.equal(d.counters.migratedBytes, 0)
  t.match(await ask(d, decodeBody(body, { migration_request: good })), { usage: { completion_tokens: 4 } }, 'after all that the good one is served')
  await checkIdle(t, p, d)
})

t.test('spans and latencies: P prefills, D migrates and decodes', async t => {
  const exporter = new InMemorySpanExporter()
  trace.setGlobalTracerProvider(new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] }))
  propagation.setGlobalPropagator(new W3CTraceContextPropagator())
  t.teardown(() => { trace.disable(); propagation.disable(); context.disable() })
  const latencies: string[] = []
  d.counters.onObserve(name => latencies.push(name))
  const of = (spanId: string): { context: typeof ROOT_CONTEXT } =>
    ({ context: trace.setSpanContext(ROOT_CONTEXT, { traceId: '0af7651916cd43dd8448eb211c80319c', spanId, traceFlags: TraceFlags.SAMPLED, isRemote: true }) })
  const body = { messages: [user('How are you?')], temperature: 0 }
  const prefilled = await prefill(p, body, of('b7ad6b7169203331'))
  const answer = await ask(d, decodeBody(body, prefilled), of('c8be7c827a314442'))
  const spans = exporter.getFinishedSpans()
  t.same(spans.map(span => [span.name, span.parentSpanContext?.spanId]), [['engine.prefill', 'b7ad6b7169203331'], ['engine.migrate', 'c8be7c827a314442'], ['engine.decode', 'c8be7c827a314442']])
  t.match(spans[0]?.attributes, { 'gen_ai.usage.input_tokens': answer.usage.prompt_tokens, 'gen_ai.usage.output_tokens': 1, 'gen_ai.response.finish_reasons': ['length'] })
  t.match(spans[1]?.attributes, { 'epd.pool': 'kv', 'epd.bytes': BLOCK_BYTES, 'epd.blocks': 1, 'epd.tokens': answer.usage.prompt_tokens, 'epd.cached': 0, 'epd.link': /ipc|tcp/, 'epd.peer': prefilled.migration_request.remote_engine_id })
  t.match(spans[2]?.attributes, { 'gen_ai.usage.output_tokens': answer.usage.completion_tokens, 'gen_ai.response.finish_reasons': ['stop'] })
  t.same(latencies, ['time_to_first_token', 'time_per_output_token'])
  await checkIdle(t, p, d)
})
