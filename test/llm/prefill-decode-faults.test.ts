import { once } from 'node:events'
import { fork } from 'node:child_process'
import { cp, mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import type { P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { drawScene } from '../helper/scenes.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'
import { forkOptions } from '../helper/node-command.ts'
import { until } from '../helper/until.ts'
import { FlakyProxy } from '../p2p/flaky-proxy.ts'
import {
  ask, askByPrefill, checkIdle, decodeBody, encode, endpointOf, events, failure, link, pictureParts, prefill, send, startEncoder, startLlm, user, withResults, type Prefilled
} from './harness.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const hello = { messages: [user('How are you?')], temperature: 0 }
const FINE = 'I am fine, thank you.'
/** A prompt of so many tokens, each of its own kind so that no two share a prefix. */
const prompt = (length: number, kind: number): object => ({ prompt: [300 + kind, ...Array<number>(length - 1).fill(42)], temperature: 0, ignore_eos: true })

const [encoder, d] = await Promise.all([startEncoder(t), startLlm(t, { role: 'decode' })])

t.test('a lease of P ends once, by whatever comes first', async t => {
  const p = await startLlm(t, { role: 'prefill', vision: false, leaseMs: 60_000 })
  await link(d, p)
  const open = (): number | undefined => p.gauges().epd_leases_open

  await t.test('a second ACK, a repeated free_cache and unknown names do nothing', async t => {
    const { migration_request: migration, cache_session_id: session, cache_block_ids: blocks, remote_token_ids: tokens } = await prefill(p, hello)
    t.same([migration.remote_block_ids, migration.remote_session_id, [migration.remote_token_id]], [blocks, session, tokens])
    t.equal(open(), 1)
    t.equal(p.gauges().epd_kv_blocks_free, p.gauges().epd_kv_blocks_capacity! - 1, 'its block is held')
    p.clearCache()
    t.equal(p.gauges().epd_kv_blocks_free, p.gauges().epd_kv_blocks_capacity! - 1, 'also when the caches are cleared')
    p.runtime?.engine.checkIntegrity()
    t.match(await ask(d, decodeBody(hello, { migration_request: migration })), { choices: [{ message: { content: FINE } }] })
    await until(() => open() === 0, 'the ACK has arrived')
    const name = { engineId: migration.remote_engine_id, epoch: migration.epoch, lease: migration.lease }
    t.same(await d.p2p.ack(name), { ended: false })
    t.same(await d.p2p.release({ ...name, lease: 'ffffffffffffffff' }), { ended: false })
    t.equal(p.counters.acks, 1)
    for (const id of [session, session, 4711, migration.lease, 'unknown']) p.endSession(id)
    t.match(await failure(ask(d, decodeBody(hello, { migration_request: migration }))), { status: 410, code: 'kv_gone' }, 'it is good for one pull')
    await checkIdle(t, p, d)
  })

  await t.test('free_cache by session or lease, abort of the answered request, and a client that goes away free the blocks', async t => {
    const one = await prefill(p, hello)
    p.endSession(one.cache_session_id)
    const two = await prefill(p, hello)
    p.endSession(two.migration_request.lease)
    await prefill(p, hello, { requestId: 'answered' })
    await prefill(p, { messages: [user('What is new?')] }, { requestId: 'answered' })
    t.equal(open(), 2)
    t.ok(p.abort('answered'), 'all that carry the id')
    t.notOk(p.abort('answered'))
    const gone = new AbortController()
    await prefill(p, hello, { signal: gone.signal })
    gone.abort()
    t.equal(open(), 0)
    t.equal(p.counters.acks, 1, 'none of these is an ACK')
    await checkIdle(t, p, d)
  })

  await t.test('it expires when D does not come; D\'s failure leaves it alone', async t => {
    const short = await startLlm(t, { role: 'prefill', vision: false, leaseMs: 30 })
    await link(d, short)
    const late = await prefill(short, hello)
    await until(() => short.gauges().epd_leases_open === 0, 'the lease has expired')
    t.match(await failure(send(d, decodeBody({ ...hello, stream: true }, late))), { status: 410, code: 'kv_gone' }, 'a status, as nothing was streamed yet')
    const kept = await prefill(p, hello)
    const wrong = (change: object): object => decodeBody(hello, { migration_request: { ...kept.migration_request, ...change } })
    t.match(await failure(ask(d, wrong({ remote_engine_id: 'http://nobody' }))), { status: 409, code: 'not_linked' })
    t.match(await failure(ask(d, wrong({ epoch: kept.migration_request.epoch + 1 }))), { status: 410, code: 'kv_gone' })
    t.match(await failure(ask(d, wrong({ remote_block_ids: [kept.cache_block_ids[0]! + 1] }))), { status: 409, code: 'wrong_model' }, 'blocks of another lease')
    t.equal(open(), 1, 'the caller may try elsewhere')
    t.match(await ask(d, decodeBody(hello, kept)), { choices: [{ message: { content: FINE } }] })
    await checkIdle(t, p, d, short)
  })

  await t.test('closing P ends it, and D serves on', async t => {
    const last = await prefill(p, hello)
    await p.close()
    t.equal(open(), 0)
    t.equal(p.gauges().epd_kv_blocks_free! + p.gauges().epd_kv_blocks_cached!, p.gauges().epd_kv_blocks_capacity)
    t.match(await failure(ask(d, decodeBody(hello, last))), { status: 410, code: 'kv_gone' })
    t.match(await ask(d, hello), { choices: [{ message: { content: FINE } }] })
    await checkIdle(t, d)
  })
})

t.test('engines that do not fit are refused at the handshake, with the reason', async t => {
  const dir = join(t.testdir(), 'tiny-internvl')
  await mkdir(dir)
  await cp(tinyModelDir, dir, { recursive: true, filter: source => !source.includes('train') })
  const config = join(dir, 'config.json')
  await writeFile(config, JSON.stringify({ ...JSON.parse(await readFile(config, 'utf8')) as object, another: true }))
  const [blocks, model] = [await startLlm(t, { role: 'prefill', vision: false, blockSize: 8 }), await startLlm(t, { role: 'prefill', vision: false, modelDir: dir })]
  await t.rejects(link(d, blocks), { code: 'REFUSED', message: /kv blocks differ: block_tokens is 8 there, 16 here/ })
  await t.rejects(link(blocks, d), { code: 'REFUSED', message: /block_tokens is 16 there, 8 here/ })
  await t.rejects(link(d, model), { code: 'REFUSED', message: /serves another model \(fingerprints differ\)/ })
  await t.rejects(link(d, encoder), { code: 'REFUSED', message: /no kind of block in common/ })
  for (const change of [{ dtype: 'float16' }, { layers: 7 }, { kv_heads: 4 }, { head_dim: 64 }]) {
    const [key] = Object.keys(change)
    const endpoint = endpointOf(blocks)
    const kv = { ...endpointOf(d).pools.kv, ...change } as NonNullable<P2PEndpointInfo['pools']['kv']>
    await t.rejects(d.p2p.connect({ ...endpoint, pools: { kv } }), { code: 'REFUSED', message: new RegExp(`kv blocks differ: ${key} is`) })
  }
  t.match(await failure(ask(d, decodeBody(hello, await prefill(model, hello)))), { status: 409, code: 'not_linked' }, 'without a link nothing is pulled')
})

t.test('a flipped byte is kv_corrupt; a pull that stalls can be cancelled, and no block is freed under it', async t => {
  const p = await startLlm(t, { role: 'prefill' })
  const d = await startLlm(t, { role: 'decode' }, { pullTimeoutMs: 600 })
  const { proxy, endpoint } = await FlakyProxy.before(endpointOf(p))
  t.teardown(() => proxy.close())
  await d.p2p.connect(endpoint)
  const body = { messages: [user(pictureParts([await drawScene(3)], 'Describe the picture.'))], temperature: 0 }
  const kept = await prefill(p, body)
  proxy.arm({ kind: 'flip', at: 9000 })
  t.match(await failure(ask(d, decodeBody(body, kept))), { status: 502, code: 'kv_corrupt' })
  await checkIdle(t, d)
  t.equal(p.gauges().epd_leases_open, 1)

  const relink = async (): Promise<void> => {
    await d.p2p.drop(endpoint.engine)
    await d.p2p.connect(endpoint)
  }
  await relink()
  proxy.arm({ kind: 'stall', at: 9000 })
  const stop = new AbortController()
  const call = failure(ask(d, decodeBody(body, kept), { signal: stop.signal }))
  await until(() => proxy.passed > 9000, 'the pull is under way')
  t.match(d.sequences(), { MIGRATION_LOCKED: 1 })
  t.ok(d.gauges().epd_kv_blocks_free! < d.gauges().epd_kv_blocks_capacity!, 'its blocks are held while they may be written')
  d.runtime?.engine.checkIntegrity()
  stop.abort()
  t.match(await call, { status: 499, code: 'cancelled' })
  await checkIdle(t, d)

  await relink()
  proxy.arm({ kind: 'stall', at: 9000 })
  t.match(await failure(ask(d, decodeBody(body, kept))), { status: 410, code: 'kv_gone', message: /longer than 600 ms/ })
  await checkIdle(t, d)
  await d.p2p.drop(endpoint.engine)
  proxy.arm({ kind: 'none' })
  await link(d, p)
  const whole = await startLlm(t)
  t.equal((await ask(d, decodeBody(body, kept))).choices[0]?.message.content, (await ask(whole, body)).choices[0]?.message.content, 'the lease has outlived it all')
  await checkIdle(t, p, d)
})

t.test('P killed with -9 after prefill is kv_gone; D serves on, and the next P too', async t => {
  const spawn = async (): Promise<{ child: ReturnType<typeof fork>, kept: Prefilled }> => {
    const child = fork(fileURLToPath(new URL('./engine-child.js', import.meta.url)), forkOptions())
    t.teardown(() => { child.kill('SIGKILL') })
    const tell = async (message: object): Promise<Record<string, unknown>> => {
      const answer = once(child, 'message')
      child.send(message)
      return (await answer)[0] as Record<string, unknown>
    }
    const { endpoint } = await tell({ op: 'open', role: 'prefill' })
    await d.p2p.connect(endpoint as P2PEndpointInfo)
    const { json } = await tell({ op: 'ask', body: { ...hello, max_tokens: 1, with_cache: true, preserve_cache: true } })
    return { child, kept: json as Prefilled }
  }
  const victim = await spawn()
  const dead = once(victim.child, 'exit')
  victim.child.kill('SIGKILL')
  await dead
  t.match(await failure(ask(d, decodeBody(hello, victim.kept))), { status: 410, code: 'kv_gone' })
  await checkIdle(t, d)
  const next = await spawn()
  t.match(await failure(ask(d, decodeBody(hello, victim.kept))), { status: 410, code: 'kv_gone' }, 'the old epoch')
  t.match(await ask(d, decodeBody(hello, next.kept)), { choices: [{ message: { content: FINE } }] })
  next.child.disconnect()
  next.child.kill('SIGKILL')
  await checkIdle(t, d)
})

t.test('without room P waits for leases to end, and D for sequences, but not for ever', async t => {
  const p = await startLlm(t, { role: 'prefill', vision: false, kvBlocks: 70 })
  const d = await startLlm(t, { role: 'decode', kvBlocks: 100 }, { roomTimeoutMs: 500 })
  await link(d, p)
  const first = await prefill(p, prompt(800, 1))
  const second = prefill(p, prompt(800, 2))
  await until(() => p.sequences().WAITING === 1, 'the second waits: fifty blocks of seventy are leased')
  const stop = new AbortController()
  const endless = await send(d, decodeBody({ ...prompt(800, 1), max_tokens: 700, stream: true }, first), { signal: stop.signal }, 'completions')
  const kept = await second
  t.equal(p.gauges().epd_leases_open, 1, 'D\'s ACK has let it in')
  const body = decodeBody({ ...prompt(800, 2), max_tokens: 2 }, kept)
  const waiting = failure(send(d, body, {}, 'completions'))
  await until(() => d.sequences().RUNNING_MIGRATION === 1, 'it waits for blocks')
  d.runtime?.engine.checkIntegrity()
  t.match(await waiting, { status: 503, code: 'busy', message: /no KV blocks for 800 tokens within 500 ms/ })
  const again = send(d, body, {}, 'completions')
  await until(() => d.sequences().RUNNING_MIGRATION === 1, 'it waits once more')
  stop.abort()
  t.match(await failure(events(endless)), { code: 'cancelled' })
  t.match(await again, { json: { usage: { prompt_tokens: 800, completion_tokens: 2 } } }, 'room came in time, and the lease was still there')
  await checkIdle(t, p, d)
})

t.test('what is cancelled at any moment at P or D leaves nothing behind', async t => {
  const p = await startLlm(t, { role: 'prefill', vision: false, kvBlocks: 60 })
  // So few blocks that sequences are spilled.
  const d = await startLlm(t, { role: 'decode', kvBlocks: 16, maxBatchSize: 8 })
  await link(p, encoder)
  await link(d, p)
  const requests = FULL ? 500 : 40
  let random = 4711
  const below = (n: number): number => { random = (Math.imul(random, 1103515245) + 12345) >>> 0; return (random >>> 8) % n }
  const pictures = await Promise.all([11, 12, 13, 14].map(seed => drawScene(seed)))
  let cancelled = 0
  const one = async (i: number): Promise<void> => {
    const stop = new AbortController()
    if (i % 3 === 0) setTimeout(() => stop.abort(), below(200))
    const urls = Array.from({ length: Math.max(below(4) - 1, 0) }, () => pictures[below(pictures.length)] as string)
    const more = { temperature: 0, ignore_eos: i % 4 > 0, max_tokens: 1 + below(110), stream: true }
    let kept: Prefilled | undefined
    try {
      const results = urls.length === 0 ? [] : await encode(encoder, urls, { signal: stop.signal })
      const body = urls.length === 0 ? { messages: [user(`How are you, number ${i}?`)], ...more } : withResults(results, 'Describe the picture.', more)
      try {
        kept = await prefill(p, body, { signal: stop.signal })
      } finally {
        // As the gateway does for every lease without an ACK.
        for (const { remote_session_id: id } of results) encoder.endSession(id)
      }
      await events(await send(d, decodeBody(body, kept), { signal: stop.signal }))
    } catch {
      cancelled++
    } finally {
      if (kept !== undefined) p.endSession(kept.cache_session_id)
    }
  }
  for (let i = 0; i < requests; i += 20) {
    if (i % 40 === 0) for (const engine of [encoder, p, d]) engine.clearCache()
    await Promise.all(Array.from({ length: 20 }, (_, k) => one(i + k)))
    for (const engine of [p, d]) engine.runtime?.engine.checkIntegrity()
  }
  t.ok(cancelled > 0 && cancelled <= requests / 2, `${cancelled} of ${requests} were cancelled`)
  t.comment(`${d.runtime?.engine.evictions} evictions`)
  t.equal(d.runtime?.engine.steps.prefilledTokens, 0)
  t.equal(d.gauges().epd_kv_blocks_spilled, 0)
  t.equal((await askByPrefill(p, d, hello)).choices[0]?.message.content, FINE)
  await checkIdle(t, encoder, p, d)
})
