import t from 'tap'
import type { EncoderEngine } from '../../engines/encoder/index.ts'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'
import { ask, checkIdle, encode, events, failure, link, pictureParts, send, startEncoder, startLlm, user, withResults } from './harness.ts'

const [encoder, engine] = await Promise.all([startEncoder(t), startLlm(t, { vision: false })])

t.test('no tokens are computed for a client that does not read, until it reads again', async t => {
  const body = { messages: [user('Tell me a story.')], temperature: 0, max_tokens: 400, ignore_eos: true, stream: true, n: 2 }
  const textsOf = (all: unknown[]): string[] => {
    const texts = ['', '']
    for (const event of all as Array<{ choices: Array<{ index: number, delta: { content?: string } }> }>) for (const { index, delta } of event.choices ?? []) texts[index] += delta.content ?? ''
    return texts
  }
  const quiet = textsOf(await events(await send(engine, body)))
  const answer = await send(engine, body)
  const live = [...engine.runtime!.engine.live]
  t.equal(live.length, 2)
  await until(() => live.every(sequence => sequence.sink.full), 'its events have piled up', 60_000)
  const generated = live.map(sequence => sequence.generated)
  t.ok(generated.every(n => n < 400), `${generated.join()} tokens`)
  await ask(engine, { messages: [user('Hello')], max_tokens: 20, ignore_eos: true })
  const now = live.map(sequence => sequence.generated)
  t.ok(now.every((n, i) => n <= generated[i]! + 1), 'others are served meanwhile, and it stands still')
  t.same(textsOf(await events(answer)), quiet, 'then it goes on where it was')
  await checkIdle(t, engine)
})

t.test('a client that leaves may come again at once with the same id', async t => {
  const body = { messages: [user('Tell me a story.')], max_tokens: 100, ignore_eos: true, stream: true }
  for (let i = 0; i < 20; i++) {
    const { stream } = await send(engine, body, { requestId: 'same' }) as { stream: AsyncIterable<Buffer> }
    const reader = stream[Symbol.asyncIterator]()
    await reader.next()
    await reader.return?.()
  }
  await checkIdle(t, engine)
})

t.test('a request without room holds up neither one whose features are here nor one that is cancelled', async t => {
  const [one, two] = await Promise.all([drawScene(1), drawScene(2)])
  const [first] = await encode(encoder, [one])
  const engine = await startLlm(t, { vision: false, featureBlocks: first!.remote_block_ids.length }, { roomTimeoutMs: 60_000 })
  await link(engine, encoder)
  const question = 'Describe the picture.'
  const stop = new AbortController()
  const holder = failure(ask(engine, withResults([first!], question, { max_tokens: 3500, ignore_eos: true }), { signal: stop.signal }))
  await until(() => engine.sequences().RUNNING === 1 || engine.sequences().LOCKED === 1, 'the pool is full')
  const waiting = encode(encoder, [two]).then(async results => await ask(engine, withResults(results, question, { max_tokens: 5 })))
  await until(() => engine.sequences().RUNNING_EPD_MIGRATION === 1, 'one waits for room')
  for (let i = 0; i < 10; i++) await ask(engine, withResults(await encode(encoder, [one]), question, { max_tokens: 2 }))
  t.equal(engine.sequences().RUNNING_EPD_MIGRATION, 1, 'those whose features are here went past it')
  const gone = new AbortController()
  const results = await encode(encoder, [two])
  const cancelled = failure(ask(engine, withResults(results, question), { signal: gone.signal }))
  await until(() => engine.sequences().RUNNING_EPD_MIGRATION === 2, 'another waits behind it')
  gone.abort()
  t.match(await cancelled, { code: 'cancelled' })
  t.equal(engine.sequences().RUNNING_EPD_MIGRATION, 1, 'it did not have to wait for its turn to leave')
  stop.abort()
  await holder
  await waiting
  encoder.endSession(results[0]!.remote_session_id)
  await checkIdle(t, engine, encoder)
})

interface Drawn { url: string, blocks: number }

/** Three pictures whose features take equally many blocks. */
async function alike (encoder: EncoderEngine): Promise<[Drawn, Drawn, Drawn]> {
  const bySize = new Map<number, Drawn[]>()
  for (let seed = 1; ; seed++) {
    const url = await drawScene(seed)
    const [result] = await encode(encoder, [url])
    encoder.endSession(result!.remote_session_id)
    const blocks = result!.remote_block_ids.length
    const found = [...bySize.get(blocks) ?? [], { url, blocks }]
    if (found.length === 3) return found as [Drawn, Drawn, Drawn]
    bySize.set(blocks, found)
  }
}

t.test('a request of two pictures that had room for one gives back what it took, and those that want the same picture do not stand in its way', async t => {
  const [one, two, three] = await alike(encoder)
  const engine = await startLlm(t, { vision: false, featureBlocks: 2 * one.blocks }, { roomTimeoutMs: 60_000 })
  await link(engine, encoder)
  const question = 'Describe the picture.'
  const stop = new AbortController()
  const holder = failure(ask(engine, withResults(await encode(encoder, [one.url]), question, { max_tokens: 3500, ignore_eos: true }), { signal: stop.signal }))
  await until(() => engine.sequences().RUNNING === 1 || engine.sequences().LOCKED === 1, 'half of the pool is held')
  const both = ask(engine, withResults(await encode(encoder, [two.url, three.url]), question, { max_tokens: 2 }))
  await until(() => engine.sequences().RUNNING_EPD_MIGRATION === 1, 'one waits for room for its second picture')
  t.equal(engine.gauges().epd_feature_blocks_free, 0, 'and has room for its first')
  // As many as migrate at once, and more.
  const others = Array.from({ length: 20 }, async () => await ask(engine, withResults(await encode(encoder, [two.url]), question, { max_tokens: 2 })))
  await Promise.all(others)
  t.equal(engine.sequences().RUNNING_EPD_MIGRATION, 1, 'they are served from its blocks, which it still has')
  stop.abort()
  await holder
  await both
  await checkIdle(t, engine, encoder)
})

t.test('no mixture of requests gets more of them in than batch and queue hold', async t => {
  const engine = await startLlm(t, { maxBatchSize: 2, maxQueue: 4 })
  const stop = new AbortController()
  const pictures = await Promise.all([1, 2, 3, 4, 5, 6].map(drawScene))
  const more = { max_tokens: 3000, ignore_eos: true }
  const texts = Array.from({ length: 6 }, (_, i) => ({ messages: [user(`Number ${i}`)], ...more }))
  const long = Array.from({ length: 6 }, (_, i) => ({ messages: Array.from({ length: 70 }, () => user(`Number ${i}`)), ...more }))
  const seen = pictures.map(url => ({ messages: [user(pictureParts([url], 'What is this?'))], ...more }))
  const bodies = texts.flatMap((body, i) => [seen[i]!, long[i]!, body])
  const results: Array<string | undefined> = []
  const all = bodies.map(async body => { results.push((await failure(ask(engine, body, { signal: stop.signal })))?.code) })
  await until(() => results.length === bodies.length - 6, 'all but six are refused')
  t.same(new Set(results), new Set(['busy']))
  await until(() => engine.runtime!.engine.live.size === 6, 'six are in')
  stop.abort()
  await Promise.all(all)
  await checkIdle(t, engine)
})
