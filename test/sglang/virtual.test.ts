/** Language servers of SGLang whose encoders are the gateway's virtual ones. */
import t, { type Test } from 'tap'
import type { EpdOptions } from '../../plugin/index.ts'
import { buildGateway, chat, pictureUrl, post, type FakeGateway } from '../helper/fake-gateway.ts'
import { FakeSglangEncoder, FakeSglangLm, recorded, type EncodeFault, type FakeLmOptions } from '../helper/fake-sglang.ts'
import { until } from '../helper/until.ts'

interface Fixture extends FakeGateway {
  readonly encoders: FakeSglangEncoder[]
  readonly lm: FakeSglangLm
  ask (...urls: string[]): Promise<Response>
}

const TRANSFERS = ['zmq_to_scheduler', 'zmq_to_tokenizer'] as const
const VIRTUAL = 4
const BAD = 'data:image/png;base64,AAAA'

async function fixture (t: Test, { encoders: count = 2, lm: lmOptions = {}, options = {} }: { encoders?: number, lm?: FakeLmOptions, options?: EpdOptions } = {}): Promise<Fixture> {
  const encoders = await Promise.all(Array.from({ length: count }, () => FakeSglangEncoder.start(t)))
  const gateway = await buildGateway(t, { options: { nodes: encoders.map(encoder => encoder.spec), ...options } })
  const { url, app } = gateway
  const lm = await FakeSglangLm.start(t, { encoderUrls: virtualUrls(url), ...lmOptions })
  app.epd.nodes.add(lm.spec)
  await app.epd.nodes.waitFor(({ nodes }) => nodes.length === count + 1 && nodes.every(node => node.state === 'healthy'), { signal: AbortSignal.timeout(10_000) })
  return { ...gateway, encoders, lm, ask: async (...urls) => await post(`${url}/v1/chat/completions`, { ...chat('?', ...urls), model: 'tiny' }) }
}

function virtualUrls (url: string): string[] {
  return Array.from({ length: VIRTUAL }, (_, i) => `${url}/sglang/v/${i}`)
}

async function textOf (answer: Response): Promise<string> {
  return (await answer.json() as { choices: Array<{ message: { content: string } }> }).choices[0]!.message.content
}

/** The encoder to which the hash sends this picture. */
async function homeOf ({ ask, encoders }: Fixture, url: string): Promise<FakeSglangEncoder> {
  const name = (await ask(url)).headers.get('x-epd-encoders')
  return encoders.find(encoder => encoder.url === name)!
}

/** Two pictures, the first of `one`, the second of `other`. */
async function picturesOf (f: Fixture, one: FakeSglangEncoder, other: FakeSglangEncoder): Promise<[string, string]> {
  const found = new Map<FakeSglangEncoder, string>()
  for (let seed = 0; found.size < 2; seed++) found.set(await homeOf(f, pictureUrl(seed)), pictureUrl(seed))
  return [found.get(one)!, found.get(other)!]
}

function held (): { readonly hold: Promise<void>, release (): void } {
  let release!: () => void
  return { hold: new Promise<void>(resolve => { release = resolve }), release: () => { release() } }
}

for (const transfer of TRANSFERS) {
  t.test(`${transfer}: answers equal those with encoders wired directly, and a picture meets its encoder again`, async t => {
    const f = await fixture(t, { lm: { transfer } })
    const direct = await FakeSglangLm.start(t, { transfer, encoderUrls: f.encoders.map(encoder => encoder.url) })
    for (let count = 1; count <= 5; count++) {
      const urls = Array.from({ length: count }, (_, i) => pictureUrl(`${count} ${i}`))
      const expected = await textOf(await post(`${direct.url}/v1/chat/completions`, chat('?', ...urls)))
      const answer = await f.ask(...urls)
      t.equal(answer.status, 200)
      t.equal(answer.headers.get('x-epd-plan'), 'e-pd')
      t.equal(answer.headers.get('x-epd-reason'), 'the language model calls encoders')
      const names = answer.headers.get('x-epd-encoders')!
      t.equal(names.split(',').length, count, 'each picture with its encoder')
      t.equal(await textOf(answer), expected)
      if (count <= VIRTUAL) t.equal((await f.ask(...urls)).headers.get('x-epd-encoders'), names, 'each went to the same encoder again')
    }
    t.ok(f.encoders.every(encoder => encoder.calls('/encode').length > 2), 'pictures spread')
    t.equal(f.app.epd.gateway.stats.encoders().reduce((sum, { items }) => sum + items, 0), 1 + 2 + 3 + 4 + 5 + 1 + 2 + 3 + 4)
    t.same(Object.values(f.app.epd.nodes.status()).map(node => node.unfinished), [0, 0, 0])
  })

  for (const fault of ['reset', 'busy', 'silent'] as const) {
    t.test(`${transfer}: a part moves from an encoder that is ${fault} to the next`, async t => {
      const f = await fixture(t, { lm: { transfer }, options: { timeouts: { encode: fault === 'silent' ? 1_500 : 30_000 } } })
      const usual = await textOf(await f.ask(pictureUrl('a')))
      const home = await homeOf(f, pictureUrl('a'))
      // A kept connection that is reset is tried once more on a fresh one.
      home.faults.push(...fault === 'reset' ? [fault, fault] as const : [fault])
      const answer = await f.ask(pictureUrl('a'))
      t.equal(answer.headers.get('x-epd-encoders'), f.encoders.find(encoder => encoder !== home)!.url)
      t.equal(await textOf(answer), usual)
      t.ok(f.app.epd.gateway.stats.encodeMoves >= 1)
      t.equal(f.lm.died, undefined)
    })
  }

  t.test(`${transfer}: encoders that fail trip their breaker like any node`, async t => {
    const f = await fixture(t, { encoders: 1, lm: { transfer } })
    const [encoder] = f.encoders as [FakeSglangEncoder]
    encoder.faults.push(...Array.from({ length: 20 }, (): EncodeFault => 'reset'))
    const answers = [await f.ask(pictureUrl('a'))]
    if (transfer === 'zmq_to_tokenizer') while (answers.length < 5) answers.push(await f.ask(pictureUrl('a')))
    t.ok(answers.every(answer => answer.status === 503))
    await until(() => f.app.epd.nodes.status()[encoder.url]!.breakers.encode === 'open', 'the breaker is open')
    t.equal((await f.ask(pictureUrl('a'))).status, 503, 'the last encoder is asked whatever its breaker says')
    encoder.faults.length = 0
    await until(async () => (await f.ask(pictureUrl('a'))).status === 200, 'and serves when it is well')
    t.equal(f.lm.died, undefined)
  })

  t.test(`${transfer}: a picture that the encoder can't read is the client's 400, and costs no server`, async t => {
    const f = await fixture(t, { lm: { transfer } })
    const answer = await f.ask(pictureUrl('a'), BAD)
    t.equal(answer.status, 400)
    t.match(await answer.json(), { error: { code: 'invalid_media', param: 'messages[0].content[1]', type: 'invalid_request_error' } })
    t.equal(f.app.epd.gateway.stats.encodeMoves, 0, 'every encoder would say so')
    if (transfer === 'zmq_to_scheduler') await until(() => f.lm.answered.length === 1, 'the server has had its answer, about a blank picture, unread')
    t.equal(f.lm.died, undefined)
    t.equal((await f.ask(pictureUrl('b'))).status, 200)
  })
}

t.test('receive URLs are held back until the encoder has read the pictures, and answered at once', async t => {
  const f = await fixture(t, { encoders: 1 })
  const { hold, release } = held()
  f.encoders[0]!.faults.push({ hold })
  const asked = f.ask(pictureUrl('a'))
  await until(() => f.encoders[0]!.calls('/scheduler_receive_meta_data').length === 1, 'the encoder is asked for metadata')
  const { request } = recorded('scheduler_receive_url')
  const id = f.lm.generations[0]!.body.rid as string
  const answer = await post(`${f.url}/sglang/v/9/scheduler_receive_url`, { ...request, req_id: `${id}_other_local_part_0` })
  t.equal(await answer.text(), 'null')
  t.equal(f.encoders[0]!.calls('/scheduler_receive_url').length, 0)
  release()
  t.equal((await asked).status, 200)
  t.equal(f.encoders[0]!.calls('/scheduler_receive_url').length, 1)
})

t.test('an encoder that dies with the receivers before it has pushed: another one delivers', async t => {
  const f = await fixture(t)
  const home = await homeOf(f, pictureUrl('a'))
  const usual = await textOf(await f.ask(pictureUrl('a')))
  home.faults.push('dies')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.status, 200)
  t.equal(await textOf(answer), usual)
  t.not(answer.headers.get('x-epd-encoders'), home.url)
  t.equal(f.lm.died, undefined)
})

t.test('an encoder that dies after it has pushed: nothing is pushed again while the server waits for other parts', async t => {
  const f = await fixture(t)
  const [one, other] = f.encoders as [FakeSglangEncoder, FakeSglangEncoder]
  const urls = await picturesOf(f, one, other)
  const usual = await textOf(await f.ask(...urls))
  const { hold, release } = held()
  const before = other.calls('/scheduler_receive_url').length
  one.faults.push('delivered')
  other.faults.push({ hold })
  const asked = f.ask(...urls)
  await until(() => !one.alive, 'the encoder has died')
  await until(() => other.calls('/encode').some(({ body }) => body.req_id.endsWith('_local_part_0.1')), 'its part is encoded again')
  t.equal(other.calls('/scheduler_receive_url').length, before, 'but not pushed yet')
  release()
  const answer = await asked
  t.equal(answer.status, 200)
  t.equal(await textOf(answer), usual)
  t.equal(f.lm.died, undefined)
})

t.test('all encoders fail: the client learns it at once, and the server gets its embeddings when one is back', async t => {
  const f = await fixture(t)
  for (const encoder of f.encoders) encoder.faults.push('reset', 'reset')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.status, 503)
  t.match(await answer.json(), { error: { code: 'encode_failed' } })
  t.ok(answer.headers.get('retry-after'))
  await until(() => f.lm.answered.length === 1, 'the server has answered, unread')
  t.equal(f.lm.died, undefined)
  t.equal((await f.ask(pictureUrl('a'))).status, 200)
})

t.test('without any encoder no request reaches the server', async t => {
  const f = await fixture(t, { encoders: 1 })
  await f.encoders[0]!.kill()
  f.app.epd.nodes.probe(f.encoders[0]!.url)
  await until(() => f.app.epd.nodes.get(f.encoders[0]!.url)?.state === 'unhealthy', 'the encoder is known to be gone')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.status, 503)
  t.match(await answer.json(), { error: { code: 'no_encoder' } })
  t.equal((await f.ask()).status, 200, 'text needs none')
  t.equal(f.lm.generations.length, 1)
  for (const path of virtualUrls(f.url)) t.equal((await fetch(`${path}/health`)).status, 200, 'the addresses stay on its list')
})

t.test('a failure after the receivers are known ends such a server, which no gateway can prevent', async t => {
  const f = await fixture(t)
  for (const encoder of f.encoders) encoder.faults.push('vit')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.status, 503)
  t.match(await answer.json(), { error: { code: 'encode_failed' } })
  await until(() => f.lm.died !== undefined, 'it has ended')
})

t.test('a client that leaves while an encoder works costs no server', async t => {
  const f = await fixture(t, { encoders: 1 })
  const { hold, release } = held()
  f.encoders[0]!.faults.push({ hold })
  const leaving = new AbortController()
  const left = post(`${f.url}/v1/chat/completions`, { ...chat('?', pictureUrl('a')), model: 'tiny' }, { signal: leaving.signal }).catch((error: Error) => error.name)
  await until(() => f.lm.waiting === 1, 'the server waits')
  leaving.abort()
  t.equal(await left, 'AbortError')
  release()
  await until(() => f.lm.answered.length === 1, 'the server has answered, unread')
  t.equal(f.lm.died, undefined)
})

t.test('a server that leaves ends its encode calls', async t => {
  const f = await fixture(t, { encoders: 1 })
  f.encoders[0]!.faults.push('silent')
  const asked = f.ask(pictureUrl('a'))
  await until(() => f.encoders[0]!.calls('/encode').length === 1, 'the encoder has the part')
  await f.lm.kill()
  t.equal((await asked).status, 502, 'the request may be why')
  await until(() => f.app.epd.nodes.status()[f.encoders[0]!.url]!.unfinished === 0, 'the call is over')
  t.equal(f.app.epd.nodes.status()[f.encoders[0]!.url]!.breakers.encode, 'closed')
})

for (const transfer of TRANSFERS) {
  t.test(`${transfer}: encode calls stand in the trace of their request`, async t => {
    const f = await fixture(t, { lm: { transfer } })
    const answer = await f.ask(pictureUrl('a'), pictureUrl('b'))
    const id = answer.headers.get('x-epd-trace-id')!
    const spans = await until(() => {
      const found = f.app.epd.traces!.get(id)?.spans ?? []
      return found.some(span => span.name === 'epd.encode') ? found : undefined
    }, 'the span has ended')
    const encode = spans.find(span => span.name === 'epd.encode')!
    t.match(encode.attributes, { 'epd.items': 2, 'epd.encoders': answer.headers.get('x-epd-encoders')!.split(','), 'epd.tokens': 8 })
    const calls = spans.filter(span => span.name === 'epd.encode.call')
    t.equal(calls.length, 2)
    for (const call of calls) t.match(call, { parentSpanId: encode.spanId, attributes: { 'epd.items': 1, 'epd.tokens': 4, 'epd.queue_ms': Number } })
    t.match(spans.find(span => span.name === 'chat tiny')?.attributes, { 'epd.topology': 'e-pd' })
    t.equal(f.encoders.flatMap(encoder => encoder.calls('/encode')).every(({ headers }) => headers.traceparent?.includes(id)), true)
    const metrics = await (await fetch(`${f.url}/metrics`)).text()
    t.match(metrics, /epd_gateway_encoded_items_total\{.*http:\/\/127/)
    t.match(metrics, /epd_stage_duration_seconds_count\{.*epd_stage="encode"/)
  })
}

t.test('zmq_to_tokenizer: a server that hangs up when it has the embeddings has been served', async t => {
  const f = await fixture(t, { encoders: 1, lm: { transfer: 'zmq_to_tokenizer' } })
  let hungUp = 0
  f.app.server.on('request', (request, response) => {
    if (request.url!.endsWith('/encode')) response.on('close', () => { if (!response.writableEnded) hungUp++ })
  })
  const { hold: late, release } = held()
  f.encoders[0]!.faults.push({ late }, { late })
  const answer = await f.ask(pictureUrl('a'), pictureUrl('b'))
  t.equal(answer.status, 200)
  await until(() => hungUp === 2, 'the gateway has lost both calls')
  t.equal(f.app.epd.nodes.status()[f.encoders[0]!.url]!.unfinished, 2, 'the encoder still is at work')
  release()
  await until(() => f.app.epd.nodes.status()[f.encoders[0]!.url]!.unfinished === 0, 'it has answered')
  t.match(f.app.epd.gateway.stats.encoders(), [{ items: 2 }])
  const id = answer.headers.get('x-epd-trace-id')!
  const spans = await until(() => {
    const found = f.app.epd.traces!.get(id)?.spans ?? []
    return found.some(span => span.name === 'epd.encode') ? found : undefined
  }, 'the span has ended')
  for (const call of spans.filter(span => span.name === 'epd.encode.call')) {
    t.equal(call.attributes['epd.aborted'], undefined)
    t.equal(call.attributes['epd.tokens'], 4)
  }
})

t.test('the same picture twice in a request counts twice', async t => {
  const f = await fixture(t)
  const answer = await f.ask(pictureUrl('a'), pictureUrl('b'), pictureUrl('a'))
  const [first, , third] = answer.headers.get('x-epd-encoders')!.split(',')
  t.ok(first)
  t.equal(third, first)
})

t.test('a server that calls no encoder shows', async t => {
  const f = await fixture(t)
  f.lm.encoderUrls.splice(0)
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.headers.get('x-epd-plan'), 'hybrid')
  t.equal(answer.headers.get('x-epd-reason'), 'the language model called no encoder')
  t.equal(answer.headers.get('x-epd-encoders'), null)
})

t.test('encoders of another model are not used', async t => {
  const f = await fixture(t)
  const home = await homeOf(f, pictureUrl('a'))
  f.app.epd.nodes.add({ ...home.spec, models: ['other'] }, { configured: true })
  t.not((await f.ask(pictureUrl('a'))).headers.get('x-epd-encoders'), home.url)
})

t.test("mooncake: what follows an encode goes to the encoder that has it, under the part's id there", async t => {
  const f = await fixture(t)
  for (const encoder of f.encoders) encoder.mooncake = true
  const { request } = recorded('encode')
  const id = 'moon_local_part_0'
  const virtual = `${f.url}/sglang/v/0`
  f.encoders[0]!.faults.push('reset')
  f.encoders[1]!.faults.push('reset')
  const meta = post(`${virtual}/scheduler_receive_meta_data`, { req_id: id, part_idx: 0 })
  const encoded = await (await post(`${virtual}/encode`, { ...request, req_id: id, num_parts: 1, part_idx: 0, mm_items: [pictureUrl('a')] })).json()
  t.match(encoded, { req_id: id, embedding_len: 4, embedding_size: 2048 })
  t.match(await (await meta).json(), { req_id: id, part_idx: 0, embedding_len: 4 })
  const sent = await post(`${f.url}/sglang/v/3/send`, { req_id: id, prefill_host: '127.0.0.1', embedding_port: 1, session_id: 's', buffer_address: 2, receive_count: 1 })
  t.equal(sent.status, 200)
  t.equal(f.encoders.flatMap(encoder => encoder.calls('/send')).length, 1)
  const again = await post(`${virtual}/send`, { req_id: id })
  t.equal(again.status, 500)
  t.match(await again.json(), { message: /no staged embedding/, req_id: id })
})

t.test("what makes no sense is refused in SGLang's words", async t => {
  const { url } = await buildGateway(t)
  const virtual = `${url}/sglang/v/0`
  for (const name of ['encode without req_id', 'encode without mm_items', 'encode without num_parts']) {
    const { request, status, answer } = recorded(name)
    const said = await post(`${virtual}/encode`, request)
    t.equal(said.status, status)
    t.strictSame(await said.json(), answer)
  }
  for (const path of ['encode', 'scheduler_receive_url', 'scheduler_receive_meta_data', 'send']) {
    for (const body of [[], 'x', 7, null, {}, { req_id: 7 }, { req_id: '' }]) t.equal((await post(`${virtual}/${path}`, body)).status, 400, `${path} ${JSON.stringify(body)}`)
    const broken = await fetch(`${virtual}/${path}`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{' })
    t.equal(broken.status, 400)
  }
  t.equal((await post(`${virtual}/encode`, recorded('encode').request, { headers: { 'x-forwarded-for': '203.0.113.9' } })).status, 403, 'for operators only')
})
