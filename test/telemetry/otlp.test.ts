/** What the gateway takes as OTLP: JSON and protobuf, with gzip, from nodes and operators, and what it does with nonsense. */
import { gzipSync } from 'node:zlib'
import t, { type Test } from 'tap'
import { readProtobufTraces } from '../../plugin/traces/otlp-protobuf.ts'
import { parseOtlpTraces } from '../../plugin/traces/otlp.ts'
import { buildGateway, chat, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'

const ROUTE = '/epd/otlp/v1/traces'
const PROTOBUF = 'application/x-protobuf'

/** Protobuf by hand, as small as a test needs it: pieces of messages. */
const varint = (value: bigint): number[] => value < 128n ? [Number(value)] : [Number(value & 127n) | 128, ...varint(value >> 7n)]
const tagged = (field: number, wire: number): number[] => varint(BigInt(field * 8 + wire))
const bytes = (field: number, value: Buffer | string): Buffer => {
  const body = Buffer.from(value as string)
  return Buffer.concat([Buffer.from([...tagged(field, 2), ...varint(BigInt(body.length))]), body])
}
const message = (field: number, ...parts: Buffer[]): Buffer => bytes(field, Buffer.concat(parts))
const whole = (field: number, value: bigint): Buffer => Buffer.from([...tagged(field, 0), ...varint(BigInt.asUintN(64, value))])
const fixed = (field: number, value: bigint): Buffer => { const at = Buffer.alloc(8); at.writeBigUInt64LE(value); return Buffer.concat([Buffer.from(tagged(field, 1)), at]) }
const double = (field: number, value: number): Buffer => { const at = Buffer.alloc(8); at.writeDoubleLE(value); return Buffer.concat([Buffer.from(tagged(field, 1)), at]) }
const attribute = (key: string, value: Buffer): Buffer => message(9, bytes(1, key), message(2, value))
const START = 1_795_875_000_123_456_789n

/** As vLLM sends the span of a request. */
function exported (traceId: string, parentSpanId: string, ...more: Buffer[]): Buffer {
  const span = message(2, bytes(1, Buffer.from(traceId, 'hex')), bytes(2, Buffer.from('b'.repeat(16), 'hex')), bytes(4, Buffer.from(parentSpanId, 'hex')), bytes(5, 'llm_request'), whole(6, 2n),
    fixed(7, START), fixed(8, START + 5_000_000n), attribute('gen_ai.usage.prompt_tokens', whole(3, 98n)), attribute('gen_ai.latency.e2e', double(4, 0.25)), ...more)
  const resource = message(1, message(1, bytes(1, 'service.name'), message(2, bytes(1, 'vllm'))), message(1, bytes(1, 'service.instance.id'), message(2, bytes(1, 'http://127.0.0.1:9'))))
  return message(1, resource, message(2, message(1, bytes(1, 'vllm.llm_engine')), span))
}

const ID = '0af7651916cd43dd8448eb211c80319c'
const PARENT = 'b7ad6b7169203331'

t.test('protobuf is read as JSON is', async t => {
  const every = exported(ID, PARENT, attribute('yes', whole(2, 1n)), attribute('no', whole(2, 0n)), attribute('minus', whole(3, -7n)), attribute('large', whole(3, 2n ** 53n)),
    attribute('list', message(5, message(1, bytes(1, 'a')), message(1, bytes(1, 'b')))), attribute('map', message(6, message(1, bytes(1, 'k')))), attribute('raw', bytes(7, 'x')), attribute('text', bytes(1, 'ä "q"')),
    message(15, bytes(2, 'it failed'), whole(3, 2n)), message(11, bytes(2, 'an event')), message(13, bytes(1, 'a link')), Buffer.from([...tagged(16, 5), 1, 0, 0, 0]))
  const { spans, rejected } = parseOtlpTraces(readProtobufTraces(every), undefined)!
  t.equal(rejected, 0)
  t.strictSame(spans, [{
    traceId: ID,
    spanId: 'b'.repeat(16),
    parentSpanId: PARENT,
    name: 'llm_request',
    kind: 'server',
    startTime: [1_795_875_000, 123_456_789],
    endTime: [1_795_875_000, 128_456_789],
    attributes: { 'gen_ai.usage.prompt_tokens': 98, 'gen_ai.latency.e2e': 0.25, yes: true, no: false, minus: -7, large: 2 ** 53, list: ['a', 'b'], text: 'ä "q"' },
    status: 'error',
    message: 'it failed',
    service: 'vllm',
    instance: 'http://127.0.0.1:9'
  }])
  t.strictSame(parseOtlpTraces(readProtobufTraces(Buffer.alloc(0)), undefined), { spans: [], rejected: 0 })
})

t.test('cut, turned or mixed bytes are refused or read, and never more', async t => {
  const good = exported(ID, PARENT)
  let seed = 1
  const random = (below: number): number => { seed = (seed * 48_271) % 2_147_483_647; return seed % below }
  for (let length = 0; length < good.length; length++) attempt(t, good.subarray(0, length))
  for (let n = 0; n < 3_000; n++) {
    const turned = Buffer.from(good)
    for (let times = 0; times <= random(3); times++) turned[random(turned.length)] = random(256)
    attempt(t, turned)
  }
  t.throws(() => readProtobufTraces(Buffer.from([0x0a, ...new Array<number>(11).fill(0xff)])), /longer than 64 bits/)
  t.throws(() => readProtobufTraces(Buffer.from([0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f])), /ends within a field/)
  t.throws(() => readProtobufTraces(Buffer.alloc(1_000_000, Buffer.from([0x0a, 0x00]))), /too many messages/)
  t.throws(() => readProtobufTraces(Buffer.from([0x0b])), /wire type/)
})

/** Either an Error, or spans in order. */
function attempt (t: Test, body: Buffer): void {
  try {
    const parsed = parseOtlpTraces(readProtobufTraces(body), undefined)
    for (const { traceId, name, startTime } of parsed?.spans ?? []) if (!/^[0-9a-f]{32}$/.test(traceId) || name === '' || !Number.isFinite(startTime[0])) t.fail(body.toString('hex'))
  } catch (err) {
    if (!(err instanceof Error) || err instanceof TypeError) t.fail(body.toString('hex'))
  }
}

/** A gateway with one request's trace, and the id of the span that its call to the node was. */
async function traced (t: Test, adminKey?: string): Promise<{ url: string, traceId: string, parent: string, spans: () => Promise<any[]> }> {
  const node = await FakeNode.start(t)
  const { url, app } = await buildGateway(t, { nodes: [node], options: { ...(adminKey === undefined ? {} : { adminKey }) } })
  const answer = await post(`${url}/v1/chat/completions`, chat('?'))
  await answer.arrayBuffer()
  const traceId = answer.headers.get('x-epd-trace-id')!
  const spans = async (): Promise<any[]> => [...app.epd.traces!.get(traceId)!.spans]
  return { url, traceId, parent: (await spans()).find(({ name }) => name === 'epd.decode').spanId, spans }
}

async function send (url: string, body: Buffer, headers: Record<string, string> = {}): Promise<Response> {
  return await fetch(url + ROUTE, { method: 'POST', body: new Uint8Array(body), headers: { 'content-type': PROTOBUF, ...headers } })
}

t.test('the span of a model server stands below the call that caused it, whichever way it comes', async t => {
  for (const [way, encode, headers] of [['plain', (body: Buffer) => body, {}], ['gzip', (body: Buffer) => gzipSync(body), { 'content-encoding': 'gzip' }]] as const) {
    const { url, traceId, parent, spans } = await traced(t)
    const answer = await send(url, encode(exported(traceId, parent)), headers)
    t.equal(answer.status, 200, way)
    t.equal(answer.headers.get('content-type'), PROTOBUF)
    t.equal((await answer.arrayBuffer()).byteLength, 0)
    t.match((await spans()).find(({ name }) => name === 'llm_request'), { parentSpanId: parent, service: 'vllm', instance: 'http://127.0.0.1:9', kind: 'server' })
    const shown = await (await fetch(`${url}/epd/traces/${traceId}`)).json() as { name: string, partial: boolean, inputTokens: number }
    t.match(shown, { name: 'chat vlm', partial: false })
  }
})

t.test('a trace that no request of the gateway is in is not begun by others', async t => {
  const { url } = await traced(t)
  t.equal((await send(url, exported(ID, PARENT))).status, 200)
  t.equal((await fetch(`${url}/epd/traces/${ID}`)).status, 404)
})

t.test("a client's own span does not pass for the gateway's request", async t => {
  const { url, traceId, parent } = await traced(t)
  await send(url, exported(traceId, parent, attribute('gen_ai.operation.name', bytes(1, 'chat')), attribute('gen_ai.provider.name', bytes(1, 'openai')), attribute('gen_ai.request.model', bytes(1, 'other'))))
  t.match(await (await fetch(`${url}/epd/traces/${traceId}`)).json(), { name: 'chat vlm', model: 'vlm' })
})

t.test('spans come from this machine, or with the admin key; a bad token is refused from anywhere', async t => {
  const { url, traceId, parent } = await traced(t, 'sesame')
  const status = async (headers: Record<string, string>): Promise<number> => (await send(url, exported(traceId, parent), headers)).status
  t.equal(await status({}), 200)
  t.equal(await status({ authorization: 'Bearer sesame' }), 200)
  t.equal(await status({ authorization: 'Bearer other' }), 401)
  t.equal(await status({ authorization: 'Basic c2VzYW1l' }), 401)
  t.equal(await status({ 'x-forwarded-for': '10.0.0.1' }), 401)
  t.equal(await status({ 'x-forwarded-for': '10.0.0.1', authorization: 'Bearer sesame' }), 200)
  t.equal(await status({ origin: 'http://evil.example' }), 401)
})

t.test('what is no export gets an error that says why', async t => {
  const { url, traceId, parent } = await traced(t)
  const answered = async (body: Buffer, headers: Record<string, string> = {}): Promise<unknown> => {
    const answer = await send(url, body, headers)
    return [answer.status, (await answer.json() as { error: { message: string } }).error.message]
  }
  const good = exported(traceId, parent)
  t.strictSame(await answered(good.subarray(0, -1)), [400, 'The body is not valid protobuf.'])
  t.strictSame(await answered(good, { 'content-type': 'application/json' }), [400, 'The body is not valid JSON.'])
  t.strictSame(await answered(Buffer.from('[]'), { 'content-type': 'application/json' }), [400, 'The body is not an OTLP ExportTraceServiceRequest.'])
  t.strictSame(await answered(good, { 'content-encoding': 'gzip' }), [400, 'The body is not valid gzip.'])
  t.strictSame(await answered(good, { 'content-encoding': 'br' }), [415, 'The body must be sent as it is, or with gzip.'])
  t.strictSame(await answered(gzipSync(Buffer.alloc(5 * 1024 * 1024)), { 'content-encoding': 'gzip' }), [413, 'The body is larger than 4194304 bytes.'])
  t.equal((await send(url, Buffer.alloc(5 * 1024 * 1024))).status, 413)
  t.equal((await send(url, good, { 'content-type': 'text/plain' })).status, 415)
  const partly = Buffer.from(await (await send(url, exported('00', parent))).arrayBuffer())
  t.equal(partly.toString('latin1'), '\n\x1d\x12\x1bmalformed or too many spans', 'partial success')
})
