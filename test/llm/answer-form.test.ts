/** Answers of a given form, from the shipped model. */
import { Ajv2020 } from 'ajv/dist/2020.js'
import t from 'tap'
import { createTurbomindEngine } from '../../engines/turbomind/index.ts'
import { drawScene } from '../helper/scenes.ts'
import { ask, askByPrefill, base, checkIdle, events, failure, link, pictureParts, send, startLlm, user, type Completion } from './harness.ts'

const schema = {
  type: 'object',
  properties: { shape: { enum: ['circle', 'square', 'star'] }, count: { type: 'integer', minimum: 0, maximum: 20 }, words: { type: 'array', items: { type: 'string', maxLength: 8 }, maxItems: 3 }, sure: { type: 'boolean' } },
  required: ['shape', 'count', 'words', 'sure'],
  additionalProperties: false
}
const form = { response_format: { type: 'json_schema', json_schema: { name: 'answer', strict: true, schema } } }
const validate = new Ajv2020().compile(schema)
const text = (answer: Completion, i = 0): string => answer.choices[i]?.message.content ?? ''
const isValid = (answer: Completion, i = 0): boolean => answer.choices[i]?.finish_reason === 'stop' && validate(JSON.parse(text(answer, i)))
const question = { messages: [user('How many circles are there?')], max_tokens: 400 }

t.test('an engine', async t => {
  const engine = await startLlm(t)

  await t.test('an answer is valid under its schema, greedy and sampled, of a text and of a picture', async t => {
    for (const temperature of [0, 1, 2]) {
      const answer = await ask(engine, { ...question, ...form, temperature, seed: 3, n: 4, logprobs: true, top_logprobs: 2 })
      for (const i of [0, 1, 2, 3]) t.ok(isValid(answer, i), text(answer, i))
    }
    const seen = await ask(engine, { ...question, ...form, messages: [user(pictureParts([await drawScene(3)], 'How many circles are there?'))], temperature: 0 })
    t.ok(isValid(seen), text(seen))
  })

  await t.test('a stream has the same text', async t => {
    const whole = await ask(engine, { ...question, ...form, temperature: 0 })
    const list = await events(await send(engine, { ...question, ...form, temperature: 0, stream: true })) as Array<{ choices: Array<{ delta: { content?: string }, finish_reason: string | null }> }>
    t.equal(list.slice(0, -1).map(chunk => chunk.choices[0]?.delta.content ?? '').join(''), text(whole))
    t.equal(list.at(-2)?.choices[0]?.finish_reason, 'stop')
  })

  await t.test('json_object gives an object; an answer that is cut off says so', async t => {
    const answer = await ask(engine, { ...question, response_format: { type: 'json_object' }, temperature: 1, seed: 5, max_tokens: 30 })
    t.ok(text(answer).startsWith('{'), text(answer))
    t.equal(answer.choices[0]?.finish_reason === 'length', answer.usage.completion_tokens === 30)
    const short = await ask(engine, { ...question, ...form, max_tokens: 4 })
    t.equal(short.choices[0]?.finish_reason, 'length')
  })

  await t.test('penalties, biases and stop strings work on', async t => {
    const answer = await ask(engine, { ...question, ...form, temperature: 1, seed: 1, frequency_penalty: 1, presence_penalty: 1, repetition_penalty: 1.2, logit_bias: { 5: -100, 9: 100 }, top_k: 5, top_p: 0.9 })
    t.ok(isValid(answer), text(answer))
    const stopped = await ask(engine, { ...question, ...form, stop: '"count"' })
    t.notMatch(text(stopped), 'count')
  })

  await t.test('other sequences get the same tokens beside constrained ones as alone', async t => {
    const plain = { messages: [user('How are you?')], temperature: 1, seed: 11, max_tokens: 40, logprobs: true }
    const alone = await ask(engine, plain)
    const [beside] = await Promise.all([ask(engine, plain), ...Array.from({ length: 6 }, (_, i) => ask(engine, { ...question, ...form, temperature: 1, seed: i }))])
    t.equal(text(beside), text(alone))
    t.same(beside?.choices[0]?.logprobs?.content.map(token => token.token), alone.choices[0]?.logprobs?.content.map(token => token.token))
  })

  await t.test('what can\'t be kept is a 400 that names the keyword', async t => {
    const refused = async (more: object): Promise<unknown> => await failure(ask(engine, { ...question, ...more }))
    const withSchema = (schema: unknown): object => ({ response_format: { type: 'json_schema', json_schema: { name: 'a', schema } } })
    t.match(await refused(withSchema({ type: 'object', properties: { a: { type: 'string', pattern: '(a|aa)+$' } } })), { status: 400, code: 'unsupported', param: 'response_format.json_schema.schema.properties.a.pattern', message: /"pattern"/ })
    t.match(await refused(withSchema({ $ref: '#' })), { status: 400, code: 'invalid_request', param: /^response_format.json_schema.schema/ })
    t.match(await refused({ response_format: { type: 'grammar' } }), { status: 400, param: 'response_format.type' })
    t.match(await refused({ response_format: 'json' }), { status: 400, param: 'response_format' })
    t.match(await refused({ response_format: { type: 'json_schema' } }), { status: 400, param: 'response_format.json_schema' })
    t.match(await refused({ ...form, ignore_eos: true }), { status: 400, param: 'ignore_eos' })
    t.match(await refused({ ...form, min_tokens: 5 }), { status: 400, param: 'min_tokens' })
  })

  await t.test('a client that leaves, and a form with many ways, leave nothing behind', async t => {
    const stop = new AbortController()
    const asked = failure(ask(engine, { ...question, ...form, n: 8, temperature: 1 }, { signal: stop.signal }))
    setImmediate(() => { stop.abort() })
    await asked
    const both = (name: string): object => ({ type: 'object', properties: { x: { anyOf: [{ $ref: '#' }, { type: 'null' }] }, [name]: { type: 'integer' } }, required: ['x', name] })
    const answer = await ask(engine, { ...question, max_tokens: 60, response_format: { type: 'json_schema', json_schema: { name: 'a', schema: { anyOf: [both('p'), both('q')] } } } })
    t.match(text(answer), /^\{\s*"x"/)
    await checkIdle(t, engine)
  })
})

t.test('prefill and decode in two engines: the first token is of the form too', async t => {
  const p = await startLlm(t, { role: 'prefill' })
  const d = await startLlm(t, { role: 'decode' })
  await link(d, p)
  for (const seed of [1, 2]) {
    const answer = await askByPrefill(p, d, { ...question, ...form, temperature: 1, seed })
    t.ok(isValid(answer), text(answer))
  }
  await checkIdle(t, p, d)
})

t.test('the TurboMind-like engine', async t => {
  const engine = await createTurbomindEngine({ ...base, engineId: 'http://form', role: 'hybrid' })
  t.teardown(() => engine.close())
  await engine.ready
  const answer = await ask(engine, { ...question, ...form, temperature: 1, seed: 2, n: 3 })
  for (const i of [0, 1, 2]) t.ok(isValid(answer, i), text(answer, i))
  await checkIdle(t, engine)
})
