import t from 'tap'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'
import { ForgedProducer } from './forged-producer.ts'
import { ask, askByEncoder, askByPrefill, checkIdle, decodeBody, encode, failure, link, prefill, startEncoder, startLlm, user, withResults, type Completion } from './harness.ts'

const textOf = (answer: Completion): string | undefined => answer.choices[0]?.message.content
/** Finite, so that they are taken, and so large that the attention over them is not. */
const overflow = (values: Float32Array): void => { values.fill(3e38) }

/** Requests of many lengths, greedy and sampled, and what they get when nothing else runs. */
const clean = Array.from({ length: 8 }, (_, i) => ({
  messages: [user(`Say ${'something '.repeat(1 + 5 * i)}about the number ${i}.`)], temperature: i % 2, seed: i, max_tokens: 12 + 4 * i, ignore_eos: true
}))

async function quietly (answerTo: (body: object) => Promise<Completion>): Promise<Array<string | undefined>> {
  const answers: Array<string | undefined> = []
  for (const body of clean) answers.push(textOf(await answerTo(body)))
  return answers
}

const [encoder, engine, p, d] = await Promise.all([
  startEncoder(t),
  startLlm(t, { vision: false, maxBatchSize: 8 }),
  startLlm(t, { role: 'prefill', vision: false }),
  startLlm(t, { role: 'decode', maxBatchSize: 8 })
])
await link(engine, encoder)
await link(d, p)

t.test('features that are not finite are refused, naming their producer, and change no other request', async t => {
  const forged = await ForgedProducer.link(t, engine, 'feature')
  const [honest] = await encode(encoder, [await drawScene(1)])
  const quiet = await quietly(body => ask(engine, body))
  const fills: Array<(values: Float32Array) => void> = [
    values => { values[0] = NaN },
    values => { values[values.length - 1] = Infinity },
    values => { values[7] = -Infinity }
  ]
  const broken = fills.map(async fill => {
    t.match(await failure(ask(engine, withResults([forged.result(honest!, fill, String(fill))], 'Describe the picture.'))), {
      status: 410, code: 'features_gone', message: new RegExp(`${forged.id} sent numbers that are not finite`)
    })
  })
  t.same(await Promise.all(clean.map(async body => textOf(await ask(engine, body)))), quiet)
  await Promise.all(broken)
  encoder.endSession(honest!.remote_session_id)
  await checkIdle(t, engine, encoder)
})

t.test('logits that are not finite end their own sequence, and change no other, then or later', async t => {
  const forged = await ForgedProducer.link(t, d, 'kv')
  const quiet = await quietly(body => askByPrefill(p, d, body))
  d.clearCache()
  const broken = async (temperature: number): Promise<void> => {
    const body = { ...clean[7]!, temperature, max_tokens: 40 }
    const { migration_request: honest } = await prefill(p, body)
    p.endSession(honest.remote_session_id)
    const answer = ask(d, decodeBody(body, { migration_request: forged.migration(honest, overflow) }))
    t.match(await failure(answer), { status: 500, code: 'internal', message: /not finite/ })
  }
  for (let round = 0; round < 2; round++) {
    const poisoned = [0, 1].map(broken)
    t.same(await Promise.all(clean.map(async body => textOf(await askByPrefill(p, d, body)))), quiet, `beside broken ones, round ${round}`)
    await Promise.all(poisoned)
  }
  t.same(await Promise.all(clean.map(async body => textOf(await askByPrefill(p, d, body)))), quiet, 'after them')
  await checkIdle(t, p, d)
})

t.test('an encoder that claims the hash of another picture changes no answer but its own', async t => {
  const forged = await ForgedProducer.link(t, engine, 'feature')
  const picture = await drawScene(1)
  const question = 'Describe the picture.'
  const greedy = { temperature: 0, max_tokens: 32 }
  const right = textOf(await askByEncoder(encoder, engine, [picture], question, greedy))
  engine.clearCache()
  const [honest] = await encode(encoder, [picture])
  const wrong = textOf(await ask(engine, withResults([forged.result(honest!, values => { values.forEach((_, i) => { values[i] = Math.sin(i) }) })], question, greedy)))
  t.not(wrong, right, 'the forged features are used for the request that names them')
  t.equal(textOf(await ask(engine, withResults([honest!], question, greedy))), right)
  await until(() => forged.idle, 'its lease has ended')
  await checkIdle(t, engine, encoder)
})

t.test('a prefill engine that claims another\'s prompt changes no answer but its own', async t => {
  const forged = await ForgedProducer.link(t, d, 'kv')
  const body = { messages: [user(`Repeat: ${'one two three '.repeat(10)}`)], temperature: 0, max_tokens: 24, ignore_eos: true }
  const right = textOf(await askByPrefill(p, d, body))
  d.clearCache()
  const { migration_request: honest } = await prefill(p, body)
  const wrong = textOf(await ask(d, decodeBody(body, { migration_request: forged.migration(honest, values => { values.fill(0.5) }) })))
  t.not(wrong, right, 'the forged keys and values are used for the request that names them')
  t.equal(textOf(await ask(d, decodeBody(body, { migration_request: honest }))), right)
  await checkIdle(t, p, d)
})
