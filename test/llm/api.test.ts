import { cp, mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { context, trace, TraceFlags, propagation, ROOT_CONTEXT } from '@opentelemetry/api'
import { W3CTraceContextPropagator } from '@opentelemetry/core'
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor, type ReadableSpan } from '@opentelemetry/sdk-trace-base'
import t from 'tap'
import type { ChatAnswer } from '../../engines/service/engine-service.ts'
import { EngineError } from '../../engines/service/errors.ts'
import { createLlmEngine } from '../../engines/llm/index.ts'
import { drawScene } from '../helper/scenes.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'
import { until } from '../helper/until.ts'
import { ask, askByEncoder, checkIdle, encode, events, failure, link, log, pictureParts, send, startEncoder, startLlm, user, withResults, type Completion } from './harness.ts'

interface Chunk {
  object: string
  choices: Array<{ index: number, delta: { role?: string, content?: string }, text?: string, finish_reason: string | null, logprobs: unknown }>
  usage?: Completion['usage'] | null
}

const hello = { messages: [user('How are you?')], temperature: 0 }

function text (answer: Completion): string {
  return answer.choices[0]?.message.content ?? ''
}

t.test('an engine with vision', async t => {
  const engine = await startLlm(t, { maxQueue: 16, maxBatchSize: 16 })
  const whole = await ask(engine, hello)

  await t.test('a completion has OpenAI\'s shape', async t => {
    t.match(whole, { id: /^chatcmpl-[0-9a-f]{32}$/, object: 'chat.completion', created: Number, model: 'tiny-internvl', system_fingerprint: /^fp_/ })
    t.match(whole.choices, [{ index: 0, message: { role: 'assistant', content: String }, finish_reason: 'stop', logprobs: null }])
    const { prompt_tokens: prompt, completion_tokens: completion, total_tokens: total } = whole.usage
    t.equal(prompt + completion, total)
    t.equal(whole.usage.prompt_tokens_details.image_tokens, 0)
    t.ok(text(whole).length > 3, text(whole))
  })

  await t.test('a stream has the same text in pieces: role first, finish reason last, usage when asked', async t => {
    const list = await events(await send(engine, { ...hello, stream: true, stream_options: { include_usage: true } }))
    t.equal(list.pop(), '[DONE]')
    const chunks = list as Chunk[]
    t.same(chunks.pop(), { ...chunks[0], choices: [], usage: { ...whole.usage } })
    t.ok(chunks.every(chunk => chunk.object === 'chat.completion.chunk' && chunk.usage === null))
    t.same(chunks[0]?.choices[0], { index: 0, delta: { role: 'assistant', content: '', refusal: null }, logprobs: null, finish_reason: null })
    t.equal(chunks.map(chunk => chunk.choices[0]?.delta.content ?? '').join(''), text(whole))
    t.same(chunks.at(-1)?.choices, [{ index: 0, delta: {}, logprobs: null, finish_reason: 'stop' }])
    t.ok(chunks.length > 4)
    const plain = await events(await send(engine, { ...hello, stream: true })) as Chunk[]
    t.ok(plain.every(chunk => typeof chunk === 'string' || !('usage' in chunk)), 'no usage unless asked')
  })

  await t.test('stop strings and ids, lengths and minimum lengths', async t => {
    const content = text(whole)
    const cut = content.slice(3, 6)
    t.equal(text(await ask(engine, { ...hello, stop: ['never', cut] })), content.slice(0, content.indexOf(cut)))
    t.equal(text(await ask(engine, { ...hello, stop: cut, include_stop_str_in_output: true })), content.slice(0, content.indexOf(cut) + cut.length))
    const short = await ask(engine, { ...hello, max_completion_tokens: 2, max_tokens: 50 })
    t.same([short.choices[0]?.finish_reason, short.usage.completion_tokens], ['length', 2])
    const ids = engine.runtime!.tokenizer.encode(content)
    t.equal((await ask(engine, { ...hello, stop_token_ids: [ids[1]] })).usage.completion_tokens, 2)
    const long = await ask(engine, { ...hello, min_tokens: 30 })
    t.ok(long.usage.completion_tokens >= 30)
    const forced = await ask(engine, { ...hello, ignore_eos: true, max_tokens: 40 })
    t.same([forced.choices[0]?.finish_reason, forced.usage.completion_tokens], ['length', 40])
    t.equal((await ask(engine, { ...hello, logit_bias: { [ids[0] as number]: 100 }, max_tokens: 3 })).usage.completion_tokens, 3)
    t.equal((await ask(engine, { ...hello, seed: 1 })).choices[0]?.message.content, content, 'greedy needs no seed')
  })

  await t.test('a seed gives the same text whatever it is batched with, and choices differ from each other', async t => {
    const sampled = { messages: [user('Tell me a story.')], temperature: 2, seed: 42, max_tokens: 24, ignore_eos: true, n: 4 }
    const alone = await ask(engine, sampled)
    const [together] = await Promise.all([ask(engine, sampled), ...Array.from({ length: 3 }, (_, i) => ask(engine, { ...hello, messages: [user(`Number ${i}`)], max_tokens: 20 + i }))])
    t.same(together.choices, alone.choices)
    t.ok(new Set(alone.choices.map(choice => choice.message.content)).size > 1)
    t.equal(alone.usage.completion_tokens, 96)
    const streamed = (await events(await send(engine, { ...sampled, stream: true })) as Chunk[]).filter(chunk => typeof chunk !== 'string')
    t.same([0, 1, 2, 3].map(index => streamed.flatMap(chunk => chunk.choices).filter(choice => choice.index === index).map(choice => choice.delta.content ?? '').join('')),
      alone.choices.map(choice => choice.message.content))
  })

  await t.test('log probabilities come with bytes, in streams too', async t => {
    const answer = await ask(engine, { ...hello, logprobs: true, top_logprobs: 2 })
    const content = answer.choices[0]!.logprobs!.content
    t.equal(Buffer.from(content.flatMap(entry => entry.bytes)).toString(), text(answer))
    t.ok(content.every(entry => entry.logprob <= 0 && entry.top_logprobs.length === 2 && entry.top_logprobs[0]!.token === entry.token))
    const streamed = await events(await send(engine, { ...hello, logprobs: true, stream: true })) as Chunk[]
    t.equal(streamed.filter(chunk => chunk.choices?.[0]?.logprobs).length, content.length)
  })

  await t.test('/v1/completions: the sampled token is among the likeliest ones, and offsets are the same streamed or whole', async t => {
    interface Logprobs { tokens: string[], token_logprobs: number[], top_logprobs: Array<Record<string, number>>, text_offset: number[] }
    const body = { prompt: 'One day', logprobs: 1, temperature: 2, seed: 7, max_tokens: 40, ignore_eos: true, stop: ['never to be seen'] }
    const whole = (await send(engine, body, {}, 'completions') as { json: { choices: Array<{ logprobs: Logprobs }> } }).json.choices[0]!.logprobs
    t.ok(whole.tokens.every((token, i) => whole.top_logprobs[i]![token] === whole.token_logprobs[i]), 'each is there with its own log probability')
    t.ok(whole.top_logprobs.some(top => Object.keys(top).length === 2), 'also one that is not the likeliest')
    const chunks = await events(await send(engine, { ...body, stream: true }, {}, 'completions')) as Array<{ choices?: Array<{ logprobs: Logprobs | null }> }>
    t.same(chunks.flatMap(chunk => chunk.choices?.[0]?.logprobs?.text_offset ?? []), whole.text_offset)
  })

  await t.test('/v1/completions takes text, ids and lists, and has its own shape', async t => {
    const prompt = '<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n'
    const complete = async (body: object): Promise<Completion & { choices: Array<{ text: string }> }> =>
      (await send(engine, { temperature: 0, max_tokens: 30, ...body }, {}, 'completions') as { json: Completion & { choices: Array<{ text: string }> } }).json
    const answer = await complete({ prompt, logprobs: 1 })
    t.match(answer, { object: 'text_completion', id: /^cmpl-/, choices: [{ index: 0, finish_reason: 'stop', logprobs: { tokens: Array, text_offset: Array } }] })
    t.equal(answer.choices[0]?.text, text(whole), 'the chat template makes just this prompt')
    const ids = engine.runtime!.tokenizer.encode(prompt)
    t.same((await complete({ prompt: [ids, ids], n: 2 })).choices.map(choice => choice.text), Array(4).fill(text(whole)))
    const chunks = (await events(await send(engine, { temperature: 0, prompt: ids, stream: true }, {}, 'completions')) as Chunk[]).filter(chunk => typeof chunk !== 'string')
    t.equal(chunks.map(chunk => chunk.choices[0]?.text ?? '').join(''), text(whole))
    for (const bad of [undefined, '', [], [[]], [1.5], [10 ** 6], ['ok', 7], Array(200).fill('a')]) {
      t.match(await failure(complete({ prompt: bad })), { status: 400, code: 'invalid_request', param: /^prompt/ })
    }
    for (const [key, value] of Object.entries({ echo: true, suffix: 'x', best_of: 3, encoder_result: [{}] })) t.match(await failure(complete({ prompt, [key]: value })), { status: 400, code: 'unsupported', param: key })
  })

  await t.test('it reads pictures by itself, as an encoder would have', async t => {
    const url = await drawScene(7)
    const encoder = await startEncoder(t)
    await link(engine, encoder)
    const own = await ask(engine, { messages: [user(pictureParts([url], 'Describe the picture.'))], temperature: 0 })
    t.ok(own.usage.prompt_tokens_details.image_tokens > 0)
    const encoded = engine.counters.encodedItems
    const remote = await askByEncoder(encoder, engine, [url], 'Describe the picture.', { temperature: 0 })
    t.equal(text(remote), text(own))
    t.equal(engine.counters.encodedItems, encoded)
    t.ok(engine.counters.migratedBytes > 0, 'another engine\'s word for a hash is no proof: its features are pulled')
    t.match(await failure(ask(engine, { messages: [user(pictureParts(['data:image/png;base64,AAAA'], 'x'))] })), { status: 400, code: 'invalid_media', param: 'messages[0].content[0]' })
    await checkIdle(t, encoder, engine)
  })

  await t.test('what a client may send without effect is taken, what it may not is refused by name', async t => {
    const fine = {
      ...hello,
      model: 'tiny-internvl',
      user: 'u',
      metadata: { a: 'b' },
      store: false,
      tools: [],
      tool_choice: 'auto',
      parallel_tool_calls: true,
      response_format: { type: 'text' },
      service_tier: 'auto',
      logit_bias: null,
      stop: null,
      stream_options: null,
      n: null,
      seed: null,
      top_k: -1,
      modalities: ['text'],
      best_of: 1,
      add_generation_prompt: true,
      guided_json: null,
      structured_outputs: null,
      echo: false,
      chat_template: null,
      ec_transfer_params: null,
      cache_salt: 'x',
      temprature: 3
    }
    t.equal(text(await ask(engine, fine)), text(whole))
    const [prompt] = hello.messages
    for (const messages of [
      [{ role: 'system', content: [] }, prompt], [{ role: 'system', content: null }, prompt], [{ role: 'user', content: [{ type: 'input_text', text: 'Hello' }] }],
      [prompt, { role: 'assistant', content: [{ type: 'refusal', refusal: 'no' }] }, prompt], [prompt, { role: 'assistant', content: [{ type: 'output_text', text: 'yes', annotations: [] }], name: null, tool_calls: null }, prompt]
    ]) t.type(text(await ask(engine, { ...hello, messages })), 'string', JSON.stringify(messages))
    const bad: Array<[object, string]> = [
      [{ temperature: 'hot' }, 'temperature'], [{ temperature: 3 }, 'temperature'], [{ temperature: -1 }, 'temperature'], [{ top_p: 2 }, 'top_p'],
      [{ top_k: 1.5 }, 'top_k'], [{ min_p: -1 }, 'min_p'], [{ n: 0 }, 'n'], [{ n: 1000 }, 'n'], [{ n: 100 }, 'n'], [{ max_tokens: 0 }, 'max_tokens'], [{ max_completion_tokens: 'x' }, 'max_completion_tokens'],
      [{ stop: [''] }, 'stop'], [{ stop: 5 }, 'stop'], [{ stop: Array(17).fill('x') }, 'stop'], [{ stop_token_ids: [-1] }, 'stop_token_ids'], [{ stream: 'yes' }, 'stream'],
      [{ stream_options: { include_usage: true } }, 'stream_options'], [{ stream: true, stream_options: 7 }, 'stream_options'], [{ logit_bias: { x: 1 } }, 'logit_bias'],
      [{ logit_bias: { 5: 101 } }, 'logit_bias'], [{ logit_bias: [] }, 'logit_bias'], [{ seed: 'x' }, 'seed'], [{ top_logprobs: 2 }, 'top_logprobs'], [{ logprobs: true, top_logprobs: 21 }, 'top_logprobs'],
      [{ logprobs: 3 }, 'logprobs'], [{ presence_penalty: 5 }, 'presence_penalty'], [{ repetition_penalty: 0 }, 'repetition_penalty'], [{ ignore_eos: 1 }, 'ignore_eos'],
      [{ messages: undefined }, 'messages'], [{ messages: [] }, 'messages'], [{ messages: 'x' }, 'messages'], [{ messages: [7] }, 'messages[0]'], [{ messages: [{ role: 'robot', content: 'x' }] }, 'messages[0].role'],
      [{ messages: [user(7)] }, 'messages[0].content'], [{ messages: [user({})] }, 'messages[0].content'], [{ messages: [user([{ type: 'text' }])] }, 'messages[0].content[0].text'],
      [{ messages: [user([{ type: 'picture' }])] }, 'messages[0].content[0]'], [{ messages: [user('<IMG_CONTEXT>')] }, 'messages'], [{ chat_template_kwargs: 'x' }, 'chat_template_kwargs'],
      [{ session_id: 'x' }, 'session_id'], [{ epd_tenant: 7 }, 'epd_tenant'], [{ model: 7 }, 'model']
    ]
    for (const [more, param] of bad) t.match(await failure(ask(engine, { ...hello, ...more })), { status: 400, code: 'invalid_request', param }, JSON.stringify(more).slice(0, 80))
    const unsupported: Array<[object, string]> = [
      [{ tools: [{ type: 'function', function: { name: 'f' } }] }, 'tools'], [{ modalities: ['audio'] }, 'modalities'],
      [{ audio: { voice: 'x' } }, 'audio'], [{ messages: [{ role: 'tool', content: 'x' }] }, 'messages[0]'], [{ messages: [user([{ type: 'input_audio' }])] }, 'messages[0].content[0]'],
      [{ migration_request: { protocol: 1 } }, 'migration_request'], [{ with_cache: true }, 'with_cache'], [{ return_token_ids: true }, 'return_token_ids'],
      [{ guided_json: { type: 'object' } }, 'guided_json'], [{ structured_outputs: { regex: 'a' } }, 'structured_outputs'], [{ best_of: 2 }, 'best_of'], [{ add_generation_prompt: false }, 'add_generation_prompt']
    ]
    for (const [more, param] of unsupported) t.match(await failure(ask(engine, { ...hello, ...more })), { status: 400, code: 'unsupported', param }, param)
    t.match(await failure(ask(engine, { ...hello, model: 'gpt-5' })), { status: 404, code: 'model_not_found', param: 'model' })
    t.match(await failure(ask(engine, [])), { status: 400, code: 'invalid_request' })
    t.match(await failure(ask(engine, { ...hello, messages: [user('word '.repeat(6000))] })), { status: 400, code: 'context_length_exceeded', param: 'messages' })
    t.equal(text(await ask(engine, hello)), text(whole), 'the engine goes on serving')
    await checkIdle(t, engine)
  })

  await t.test('cancelling ends a request at once: by signal, by id, by session, and by leaving the stream', async t => {
    const long = { ...hello, ignore_eos: true, max_tokens: 3000, stream: true }
    const stop = new AbortController()
    const first = await send(engine, long, { signal: stop.signal })
    stop.abort()
    t.match(await failure(events(first)), { status: 499, code: 'cancelled' })

    const byId = await send(engine, long, { requestId: 'mine' })
    t.ok(engine.abort('mine'))
    t.match(await failure(events(byId)), { code: 'cancelled' })
    t.notOk(engine.abort('mine'), 'it is gone')

    const bySession = await send(engine, { ...long, session_id: 77 })
    t.match(await failure(ask(engine, { ...hello, session_id: 77 })), { status: 400, param: 'session_id', message: /occupied/ })
    t.ok(engine.abortSession(77))
    t.match(await failure(events(bySession)), { code: 'cancelled' })
    t.notOk(engine.abortSession(77))
    t.ok(await ask(engine, { ...hello, session_id: 77 }), 'a session id may be used again')

    const left = (await send(engine, long) as Extract<ChatAnswer, { stream: unknown }>).stream[Symbol.asyncIterator]()
    t.ok((await left.next()).value.length > 0)
    await left.return?.()
    const gone = new AbortController()
    gone.abort()
    t.match(await failure(ask(engine, hello, { signal: gone.signal })), { code: 'cancelled' })
    await checkIdle(t, engine)
  })

  await t.test('a full engine says so, and states are counted', async t => {
    const long = { ...hello, ignore_eos: true, max_tokens: 500, n: 32, stream: true }
    const running = await send(engine, long, { requestId: 'full' })
    const states = engine.sequences()
    t.equal(Object.values(states).reduce((a, b) => a + b), 32)
    t.equal((states.RUNNING ?? 0) + (states.LOCKED ?? 0), 16)
    t.equal(states.WAITING, 16)
    t.match(await failure(ask(engine, hello)), { status: 503, code: 'busy' })
    engine.abort('full')
    t.match(await failure(events(running)), { code: 'cancelled' })
    await checkIdle(t, engine)
  })

  await t.test('tenants share no prefix', async t => {
    const body = { ...hello, messages: [user('The same long text for everybody, at least two blocks of it, please. '.repeat(2))], max_tokens: 2 }
    const cached = async (tenant: string): Promise<number> => (await ask(engine, body, { tenant })).usage.prompt_tokens_details.cached_tokens
    t.equal(await cached('a'), 0)
    t.ok(await cached('a') > 0)
    t.equal(await cached('b'), 0)
    await checkIdle(t, engine)
  })
})

t.test('spans and latencies of a request', async t => {
  const exporter = new InMemorySpanExporter()
  let onStart = (_name: string): void => {}
  const watcher = { onStart: (span: { name: string }) => { onStart(span.name) }, onEnd () {}, async forceFlush () {}, async shutdown () {} }
  const provider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter), watcher] })
  trace.setGlobalTracerProvider(provider)
  propagation.setGlobalPropagator(new W3CTraceContextPropagator())
  t.teardown(() => { trace.disable(); propagation.disable(); context.disable() })
  const encoder = await startEncoder(t)
  const engine = await startLlm(t, { vision: false })
  await link(engine, encoder)
  const latencies: string[] = []
  engine.counters.onObserve(name => latencies.push(name))
  const parent = { traceId: '0af7651916cd43dd8448eb211c80319c', spanId: 'b7ad6b7169203331', traceFlags: TraceFlags.SAMPLED, isRemote: true }
  const { json } = await encoder.chat({ body: { messages: [user(pictureParts([await drawScene(8)], ''))] }, signal: new AbortController().signal, requestId: 'e', context: ROOT_CONTEXT }) as { json: { encoder_result: Array<{ lease: string, num_tokens: number }> } }
  const results = json.encoder_result
  const answer = await ask(engine, { messages: [user(pictureParts(results.map(r => `epd:${r.lease}`), 'Describe the picture.'))], encoder_result: results, temperature: 0 }, { context: trace.setSpanContext(ROOT_CONTEXT, parent) })
  const spans = Object.fromEntries(exporter.getFinishedSpans().map(span => [span.name, span]))
  for (const name of ['engine.migrate', 'engine.prefill', 'engine.decode']) {
    t.equal(spans[name]?.spanContext().traceId, parent.traceId, name)
    t.equal(spans[name]?.parentSpanContext?.spanId, parent.spanId)
  }
  t.match(spans['engine.migrate']?.attributes, { 'epd.items': 1, 'epd.bytes': results[0]!.num_tokens * 1024, 'epd.blocks': Number, 'epd.link': /ipc|tcp/, 'epd.cached': 0 })
  t.match(spans['engine.prefill']?.attributes, { 'gen_ai.usage.input_tokens': answer.usage.prompt_tokens, 'epd.cached': 0 })
  t.match(spans['engine.decode']?.attributes, { 'gen_ai.usage.output_tokens': answer.usage.completion_tokens, 'gen_ai.response.finish_reasons': ['stop'] })
  t.same(latencies, ['time_to_first_token', 'time_per_output_token'])

  exporter.reset()
  const last = async (name: string): Promise<ReadableSpan> => await until(() => exporter.getFinishedSpans().findLast(span => span.name === name), `${name} has ended`)
  const lost = await encode(encoder, [await drawScene(9)], { requestId: 'lost' })
  encoder.abort('lost')
  await t.rejects(ask(engine, withResults(lost, '?')), { code: 'features_gone' })
  t.match(await last('engine.migrate'), { status: { code: 2, message: String }, attributes: { 'error.type': 'features_gone' } })
  const client = new AbortController()
  onStart = name => { if (name === 'engine.decode') setImmediate(() => { client.abort(new EngineError('cancelled', 'The client closed the connection.')) }) }
  await t.rejects(ask(engine, hello, { signal: client.signal }))
  t.match(await last('engine.decode'), { status: { code: 0 }, attributes: { 'epd.aborted': true } }, 'a client that leaves is no error')
  exporter.reset()
  let closing: Promise<void> | undefined
  onStart = name => { if (name === 'engine.decode') setImmediate(() => { closing = engine.close() }) }
  await t.rejects(ask(engine, hello))
  t.match(await last('engine.decode'), { status: { code: 2, message: 'the engine is shutting down' }, attributes: { 'error.type': 'draining' } })
  await closing
  await checkIdle(t, encoder)
})

t.test('without vision the vision encoder\'s file is never opened; closing fails what is live', async t => {
  const dir = join(t.testdir(), 'no-eyes')
  await mkdir(dir)
  await cp(tinyModelDir, dir, { recursive: true, filter: source => !source.includes('train') })
  await rm(join(dir, 'onnx', 'vision_encoder.onnx'))
  const engine = await startLlm(t, { modelDir: dir, vision: false })
  t.equal(engine.info().vision, 'features')
  t.match(await failure(ask(engine, { messages: [user(pictureParts([await drawScene(9)], 'What is it?'))] })), { status: 400, code: 'unsupported', message: /encoder results/ })
  const running = await send(engine, { ...hello, ignore_eos: true, max_tokens: 2000, stream: true })
  const end = failure(events(running))
  await engine.close()
  t.match(await end, { status: 503, code: 'draining' })
  t.match(await failure(ask(engine, hello)), { status: 503, code: 'draining' })
  await until(() => engine.gauges().epd_kv_blocks_free! + engine.gauges().epd_kv_blocks_cached! === engine.gauges().epd_kv_blocks_capacity, 'all blocks are back')
})

t.test('an engine that can\'t start says why', async t => {
  const options = {
    engineId: 'http://x', backend: 'pytorch', modelDir: tinyModelDir, host: '127.0.0.1', device: 'cpu', threads: 1, vision: true, media: { allowPrivate: false, allowedDomains: [] }, log
  } as const
  t.match(await failure(createLlmEngine({ ...options, role: 'encoder' })), { code: 'unsupported', message: /no role encoder/ })
  await t.rejects(createLlmEngine({ ...options, role: 'hybrid', modelDir: '/nowhere' }), /config.json/)
})
