/** Requests that are told of before their pictures are encoded. Whatever becomes of that, the answer is the same and nothing is left. */
import { propagation, ROOT_CONTEXT, trace, TraceFlags } from '@opentelemetry/api'
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-base'
import t, { type Test } from 'tap'
import type { EncoderEngine } from '../../engines/encoder/index.ts'
import type { LlmService } from '../../engines/llm/index.ts'
import { drawScene } from '../helper/scenes.ts'
import { slowPicture } from '../helper/slow-picture.ts'
import { until } from '../helper/until.ts'
import { ask, checkIdle, encode, endpointOf, events, failure, link, pictureParts, send, startEncoder, startLlm, user, withResults } from './harness.ts'

const GREEDY = { temperature: 0, max_tokens: 12 }
const media = { allowPrivate: true, allowedDomains: [] }
const LONG = 'A circle is round, a square has four corners, and a triangle has three of them. '.repeat(8)

interface Stand {
  readonly encoder: EncoderEngine
  readonly engine: LlmService
  /** Prompt tokens that were computed. */
  prefilled (): number
}

async function stand (t: Test, options: Parameters<typeof startLlm>[1] = {}, tuning: Parameters<typeof startLlm>[2] = {}): Promise<Stand> {
  const [encoder, engine] = await Promise.all([startEncoder(t, { media }), startLlm(t, { vision: false, ...options }, tuning)])
  await link(engine, encoder)
  await encoder.p2p.connect(endpointOf(engine))
  return { encoder, engine, prefilled: () => engine.runtime!.engine.steps.prefilledTokens }
}

async function atRest (t: Test, { engine, encoder }: Stand): Promise<void> {
  await until(() => engine.runtime!.engine.live.size === 0 && [engine, encoder].every(one => one.gauges().epd_leases_open === 0), 'nothing is under way')
  await checkIdle(t, engine, encoder)
}

/** As the gateway tells of a request. */
const told = (pictures: number, text = LONG): object => ({ messages: [user(pictureParts(Array.from({ length: pictures }, (_, i) => `epd:${i}`), text))], ...GREEDY })

const encoding = (engine: LlmService, id: string, numbers = '0,1,2'): { consumer: string, overlap: string } => ({ consumer: endpointOf(engine).engine, overlap: `${id}:${numbers}` })

/** The answer of an engine that was told nothing, for pictures of a stand that has them. */
async function alone (t: Test, urls: readonly string[], text = LONG): Promise<{ choices: unknown, usage: unknown, prefilled: number }> {
  const fresh = await stand(t)
  const { choices, usage } = await ask(fresh.engine, withResults(await encode(fresh.encoder, urls), text, GREEDY))
  return { choices, usage, prefilled: fresh.prefilled() }
}

t.test('the prompt is computed as far as its pictures are there, and nothing twice', async t => {
  const urls = await Promise.all([101, 102, 103].map(drawScene))
  const expected = await alone(t, urls)
  const here = await stand(t)
  const { encoder, engine, prefilled } = here
  const encodeText = engine.runtime!.tokenizer.encode.bind(engine.runtime!.tokenizer)
  let encodings = 0
  engine.runtime!.tokenizer.encode = text => { encodings++; return encodeText(text) }

  await send(engine, told(3), { requestId: 'a', ahead: true })
  t.equal(encodings, 1, 'it is tokenised when it is told')
  const slow = await slowPicture(t, urls[2]!)
  const call = encode(encoder, [urls[0]!, urls[1]!, slow.url], encoding(engine, 'a'))
  const tokens = engine.model.tokensFor({ width: 1, height: 1 }).numTokens
  await until(() => prefilled() > 2 * tokens, 'two pictures are computed while the third is not there')
  slow.send()
  const { choices, usage } = await ask(engine, withResults(await call, LONG, GREEDY), { requestId: 'a' })
  t.same({ choices, usage }, { choices: expected.choices, usage: expected.usage }, 'what was computed ahead is no hit of the cache')
  t.equal(encodings, 1)
  const blocks = 16
  t.ok(prefilled() - expected.prefilled < 3 * blocks, `${prefilled()} tokens, ${expected.prefilled} without`)
  await atRest(t, here)
})

t.test('a long text before the picture is computed while the picture is encoded', async t => {
  const url = await drawScene(111)
  const before = [user(LONG), { role: 'assistant', content: 'I see.' }]
  const here = await stand(t)
  const { encoder, engine, prefilled } = here
  const body = (urls: readonly string[], more: object): object => ({ messages: [...before, user(pictureParts(urls, 'How many?'))], ...GREEDY, ...more })
  await send(engine, body(['epd:0'], {}), { requestId: 'a', ahead: true })
  const slow = await slowPicture(t, url)
  const call = encode(encoder, [slow.url], encoding(engine, 'a'))
  await until(() => engine.runtime!.engine.live.size === 0 && prefilled() > 100, 'the text is computed')
  slow.send()
  const results = await call
  const first = await ask(engine, body(results.map(({ lease }) => `epd:${lease}`), { encoder_result: results }), { requestId: 'a' })
  t.equal(first.usage.prompt_tokens_details.cached_tokens, 0)
  const again = await encode(encoder, [url])
  const second = await ask(engine, body(again.map(({ lease }) => `epd:${lease}`), { encoder_result: again }))
  t.same(second.choices, first.choices)
  t.ok(second.usage.prompt_tokens_details.cached_tokens > 100, 'a second time it is one')
  await atRest(t, here)
})

t.test('it gives way to requests that are here, and waits for none of them to end', async t => {
  const here = await stand(t)
  const { encoder, engine, prefilled } = here
  const expected = await ask(engine, { messages: [user('How many?')], ...GREEDY })
  const before = prefilled()
  const stream = await send(engine, { messages: [user('How many?')], ...GREEDY, max_tokens: 200, ignore_eos: true, stream: true })
  await send(engine, told(2), { requestId: 'a', ahead: true })
  const [url] = await Promise.all([drawScene(121)])
  const slow = await slowPicture(t, await drawScene(122))
  const call = encode(encoder, [url, slow.url], encoding(engine, 'a'))
  await until(() => engine.counters.ahead.pulled === 1, 'a picture is there')
  const streamed = events(stream)
  await streamed
  t.ok(prefilled() - before < 20, 'nothing was computed ahead beside the stream')
  slow.send()
  await call.then(results => ask(engine, withResults(results, LONG, GREEDY), { requestId: 'a' }))

  // Another request comes while a long prompt is computed ahead.
  const long = (word: string): object => ({ messages: [user(Array.from({ length: 400 }, (_, i) => `${word}${i}`).join(' ')), user(pictureParts(['epd:0'], 'How many?'))], ...GREEDY })
  await send(engine, long('x'), { requestId: 'b', ahead: true })
  t.equal(engine.runtime!.engine.live.size, 1, 'it is being computed')
  const answer = ask(engine, { messages: [user('How many?')], ...GREEDY })
  t.same((await answer).choices, expected.choices)
  t.ok([...engine.runtime!.engine.live].length === 0, 'what was computed ahead has ended before it')
  await atRest(t, here)
})

t.test('it takes no place of a request', async t => {
  const here = await stand(t, { maxBatchSize: 1, maxQueue: 0 })
  await send(here.engine, { messages: [user(LONG.repeat(2)), ...(told(1) as { messages: object[] }).messages] }, { requestId: 'a', ahead: true })
  t.equal(here.engine.runtime!.engine.live.size, 1, 'the only place is taken')
  t.equal((await ask(here.engine, { messages: [user('How many?')], ...GREEDY })).choices.length, 1)
  await atRest(t, here)
})

t.test('what is computed ahead is no hit of the first request that finds it, whoever was told, and is one of the next', async t => {
  const here = await stand(t, {}, { maxPrefillTokens: 64 })
  const { engine } = here
  const text = (word: string): object => user(Array.from({ length: 60 }, (_, i) => `${word}${i}`).join(' '))
  const hits = async (message: object, requestId: string): Promise<number> => (await ask(engine, { messages: [message, user('How many?')], ...GREEDY }, { requestId })).usage.prompt_tokens_details.cached_tokens
  const tell = async (message: object): Promise<void> => {
    await send(engine, { messages: [message, user(pictureParts(['epd:0'], 'How many?'))] }, { requestId: 'a', ahead: true })
  }
  t.equal(await hits(text('x'), 'x'), 0)
  const whole = await hits(text('x'), 'x')
  t.ok(whole > 100)
  for (const { title, id } of [{ title: 'its own id', id: 'a' }, { title: 'another id', id: 'b' }]) {
    const word = id.repeat(3)
    await tell(text(word))
    await until(() => engine.runtime!.engine.live.size === 0, 'it is computed')
    t.equal(await hits(text(word), id), 0, title)
    t.ok(await hits(text(word), id) > 100)
  }
  await tell(text('y'))
  t.equal(await hits(text('x'), 'a'), whole, 'another prompt under the id of what is being computed')
  await tell(text('z'))
  t.same(await Promise.all([1, 2, 3].map(n => hits(text('x'), `several${n}`))), [whole, whole, whole], 'requests that come while a step of it runs')
  await atRest(t, here)
})

t.test('an engine that closes computes nothing ahead', async t => {
  const here = await stand(t)
  const { engine, encoder } = here
  await send(engine, told(2), { requestId: 'a', ahead: true })
  await engine.runtime!.engine.close()
  const slow = await slowPicture(t, await drawScene(162))
  const call = encode(encoder, [await drawScene(161), slow.url], encoding(engine, 'a'))
  await until(() => engine.counters.ahead.pulled === 1, 'a picture is there')
  slow.send()
  const results = await call
  await until(() => engine.counters.ahead.pulled + engine.counters.ahead.dropped === 2, 'both are looked at')
  t.equal(engine.counters.ahead.dropped, 0)
  t.equal(engine.runtime!.engine.live.size, 0)
  for (const { lease } of results) encoder.endSession(lease)
  await atRest(t, here)
})

const ODD: ReadonlyArray<{ title: string, names?: string, body?: object, fails?: RegExp }> = [
  { title: 'of no name', names: '1' },
  { title: 'of an empty name', names: '' },
  { title: 'of another request', names: 'other:0,1' },
  { title: 'of items that it does not have', names: 'a:7,-1' },
  { title: 'of no number', names: 'a:x,NaN' },
  { title: 'all of one item', names: 'a:0,0' },
  { title: 'of pictures in another order', names: 'a:1,0' },
  { title: 'of one name too few', names: 'a:0' },
  { title: 'whose text has the placeholder', body: told(2, `<IMG_CONTEXT> ${LONG}`) },
  { title: 'with another text than it comes with', body: told(2, 'Something else.') },
  { title: 'with fewer pictures', body: told(1) },
  { title: 'without pictures', body: { messages: [user('x')] } },
  { title: 'that is none', body: { messages: 7 }, fails: /messages/ },
  { title: 'that is too long', body: { messages: [user('x '.repeat(300_000)), user(pictureParts(['epd:0'], 'x'))] }, fails: /tokens/ }
]

t.test('what is told wrongly changes no answer', async t => {
  const urls = await Promise.all([131, 132].map(drawScene))
  const { choices } = await alone(t, urls)
  const here = await stand(t)
  const { encoder, engine } = here
  for (const { title, names = 'a:0,1', body = told(2), fails } of ODD) {
    await t.test(title, async t => {
      engine.clearCache()
      encoder.clearCache()
      const telling = await send(engine, body, { requestId: 'a', ahead: true }).catch((err: unknown) => err)
      if (fails === undefined) t.match(telling, { status: 200 })
      else t.match((telling as Error).message, fails)
      const results = await encode(encoder, urls, { consumer: endpointOf(engine).engine, overlap: names })
      t.same((await ask(engine, withResults(results, LONG, GREEDY), { requestId: 'a' })).choices, choices)
      await atRest(t, here)
    })
  }
})

t.test('many that never come are forgotten', async t => {
  const here = await stand(t)
  const { engine, encoder, prefilled } = here
  let most = 0
  for (let i = 0; i < 200; i++) {
    await send(engine, { messages: [user(`${i} ${LONG}`), ...(told(1) as { messages: object[] }).messages] }, { requestId: `never${i}`, ahead: true })
    most = Math.max(most, engine.runtime!.engine.live.size)
  }
  t.equal(most, 1, 'one is computed at a time')
  await until(() => engine.runtime!.engine.live.size === 0, 'nothing is computed any more')
  const before = prefilled()
  await send(engine, told(2, LONG), { requestId: 'a', ahead: true })
  const slow = await slowPicture(t, await drawScene(142))
  const call = encode(encoder, [await drawScene(141), slow.url], encoding(engine, 'a'))
  await until(() => prefilled() - before > 50, 'the last one is in view')
  slow.send(Buffer.from('no picture'))
  t.match(await failure(call), { code: 'invalid_media' })
  await atRest(t, here)
})

t.test('tenants share nothing that was computed ahead', async t => {
  const here = await stand(t)
  const { engine, prefilled } = here
  const body = { messages: [user(LONG), user(pictureParts(['epd:0'], 'x'))] }
  await send(engine, body, { requestId: 'a', tenant: 'one', ahead: true })
  await until(() => engine.runtime!.engine.live.size === 0 && prefilled() > 100, 'it is computed')
  const computed = async (tenant: string): Promise<number> => {
    const before = prefilled()
    await ask(engine, { messages: [user(LONG)], ...GREEDY }, { tenant })
    return prefilled() - before
  }
  t.ok(await computed('two') > 100)
  t.ok(await computed('one') < 50)
  await atRest(t, here)
})

t.test('the trace shows what was computed ahead', async t => {
  const exporter = new InMemorySpanExporter()
  trace.setGlobalTracerProvider(new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] }))
  t.teardown(() => { trace.disable(); propagation.disable() })
  const here = await stand(t)
  const { encoder, engine, prefilled } = here
  const context = trace.setSpanContext(ROOT_CONTEXT, { traceId: '0af7651916cd43dd8448eb211c80319c', spanId: 'b7ad6b7169203331', traceFlags: TraceFlags.SAMPLED, isRemote: true })
  await send(engine, told(2), { requestId: 'a', ahead: true, context })
  const slow = await slowPicture(t, await drawScene(152))
  const call = encode(encoder, [await drawScene(151), slow.url], encoding(engine, 'a'))
  await until(() => engine.runtime!.engine.live.size === 0 && prefilled() > 50, 'a picture is computed')
  slow.send()
  await ask(engine, withResults(await call, LONG, GREEDY), { requestId: 'a', context })
  const spans = exporter.getFinishedSpans()
  const prepared = spans.filter(({ name }) => name === 'engine.prepare').at(-1)!
  t.match(prepared.attributes, { 'epd.request.id': 'a', 'epd.cached': 0 })
  t.ok((prepared.attributes['epd.tokens'] as number) > 50)
  t.equal(prepared.status.code, 0)
  const prefill = spans.find(({ name }) => name === 'engine.prefill')!
  t.ok((prefill.attributes['epd.ahead'] as number) > 50)
  t.equal(prefill.attributes['epd.cached'], 0)
  t.ok((prefill.attributes['epd.tokens'] as number) < (prefill.attributes['gen_ai.usage.input_tokens'] as number) - 50)
  await atRest(t, here)
})
