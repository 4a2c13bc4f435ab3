/** What observing costs the gateway: spans of a picture request, taking in those of its engines, metrics, and an open page. */
import { createServer } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { propagation, ROOT_CONTEXT, trace } from '@opentelemetry/api'
import { startEngineTelemetry } from '../../engines/server/telemetry.ts'
import { spanTime } from '../../adapters/wire/spans.ts'
import { GatewayMetrics } from '../../plugin/telemetry/metrics.ts'
import { ATTR, ENGINE_TRACER_NAME, SPAN, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { startRequest } from '../../plugin/telemetry/spans.ts'
import { Tracing } from '../../plugin/telemetry/tracing.ts'
import { parseOtlpTraces } from '../../plugin/traces/otlp.ts'
import { TraceStore } from '../../plugin/traces/store.ts'
import { measurePage } from './telemetry-page.ts'
import { measureWhole } from './telemetry-whole.ts'
import { median, table, type BenchContext } from './report.ts'

export const name = 'telemetry'

const NODE = 'http://127.0.0.1:23333'
const ENGINE_SPANS = 5
/** In one call of an engine: what it sends after 200 ms at 200 requests/s. */
const REQUESTS = 40
const ID_MARK = 'feedfeed'

/** CPU of this thread per call, in microseconds, once warm. */
async function cpuOf (calls: number, run: () => unknown): Promise<number> {
  for (let i = 0; i < calls / 4; i++) await run()
  const before = process.cpuUsage()
  for (let i = 0; i < calls; i++) await run()
  const { user, system } = process.cpuUsage(before)
  return (user + system) / calls
}

/** The spans the pipeline makes of a request with a picture, with their attributes. */
async function pictureRequest (tracing: Tracing): Promise<void> {
  const chat = startRequest(tracing, { headers: {}, model: 'tiny', attributes: { [ATTR.requestStream]: true, [ATTR.requestId]: 'req-1', [ATTR.items]: 1 } })
  const plan = chat.begin(SPAN.plan, { [ATTR.attempt]: 1 })
  if (plan.recording) plan.set({ [ATTR.topology]: 'e-pd', [ATTR.reason]: '1 item on 1 encoder', [ATTR.node]: NODE })
  plan.end()
  await chat.stage(SPAN.encode, { [ATTR.items]: 1 }, async encode => {
    await encode.stage(SPAN.encodeCall, { [ATTR.node]: NODE, [ATTR.items]: 1 }, async call => call.headers)
    if (encode.recording) encode.set({ [ATTR.encoders]: [NODE], [ATTR.tokens]: 80, [ATTR.cached]: 0, [ATTR.itemTokens]: [80], [ATTR.itemCached]: [false] })
  })
  const decode = chat.begin(SPAN.decode, { [ATTR.node]: NODE })
  decode.run(() => decode.headers)
  decode.end()
  if (chat.recording) chat.set({ [ATTR.topology]: 'e-pd', [ATTR.reason]: '1 item on 1 encoder', [ATTR.encoders]: [NODE], [ATTR.statusCode]: 200, [ATTR.finishReasons]: ['stop'], [ATTR.inputTokens]: 98, [ATTR.outputTokens]: 2 })
  chat.end()
}

/** A body as an engine really sends it: the spans of so many requests. */
async function engineBody (requests: number): Promise<Buffer> {
  let body = ''
  const receiver = createServer((request, response) => {
    request.setEncoding('utf8').on('data', (chunk: string) => { body += chunk }).on('end', () => { response.end('{}') })
  })
  receiver.listen(0, '127.0.0.1')
  await once(receiver, 'listening')
  const telemetry = startEngineTelemetry({
    engineId: NODE, role: 'hybrid', version: '0.0.0', proxyUrl: `http://127.0.0.1:${(receiver.address() as AddressInfo).port}`, token: () => 'token', onRefused () {}
  })!
  const tracer = trace.getTracer(ENGINE_TRACER_NAME)
  const end = (name: string, attributes: Record<string, string | number | string[] | number[]>, parent = ROOT_CONTEXT): void => {
    tracer.startSpan(name, { startTime: spanTime(), attributes }, parent).end(spanTime())
  }
  for (let n = 0; n < requests; n++) {
    const parent = trace.setSpanContext(ROOT_CONTEXT, { traceId: ID_MARK + (n + 1).toString(16).padStart(24, '0'), spanId: 'b'.repeat(16), traceFlags: 1 })
    end(SPAN.enginePreprocess, { [ATTR.items]: 1, [ATTR.requestId]: 'req-1' }, parent)
    end(SPAN.engineEncode, { [ATTR.tokens]: 80, [ATTR.batch]: 1, [ATTR.queueMs]: 0.2 }, parent)
    end(SPAN.engineMigrate, { [ATTR.items]: 1, [ATTR.cached]: 0, [ATTR.bytes]: 81_920, [ATTR.blocks]: 3, [ATTR.peer]: NODE, [ATTR.peerBytes]: [81_920], [ATTR.link]: 'ipc' }, parent)
    end(SPAN.enginePrefill, { [ATTR.requestId]: 'req-1', [ATTR.inputTokens]: 98, [ATTR.cached]: 48, [ATTR.tokens]: 50, [ATTR.queueMs]: 1.25 }, parent)
    end(SPAN.engineDecode, { [ATTR.requestId]: 'req-1', [ATTR.finishReasons]: ['stop'], [ATTR.outputTokens]: 2 }, parent)
  }
  await telemetry.close()
  receiver.close()
  propagation.disable()
  return Buffer.from(body)
}

/** Gives the body again and again, each time with other trace ids. */
function bodies (body: Buffer): () => Buffer {
  const places: number[] = []
  for (let at = body.indexOf(ID_MARK); at !== -1; at = body.indexOf(ID_MARK, at + ID_MARK.length)) places.push(at)
  let n = 0
  return () => {
    const copy = Buffer.from(body)
    const id = (n++).toString(16).padStart(ID_MARK.length, '0')
    for (const at of places) copy.write(id, at, 'latin1')
    return copy
  }
}

interface Costs { spans: number, idle: number, take: number, metrics: number }

async function measureCosts (bench: BenchContext, calls: number, body: Buffer): Promise<Costs> {
  const off = new Tracing()
  const idle = await cpuOf(calls, () => pictureRequest(off))
  const store = new TraceStore()
  const tracing = new Tracing(store)
  await tracing.start(bench.log)
  const spans = await cpuOf(calls, () => pictureRequest(tracing))
  await tracing.close()
  // Other ids each time, as spans that are there already would be left out. Making such a body is not the gateway's work.
  const fresh = bodies(body)
  const batches = Math.ceil(calls / REQUESTS)
  const made = await cpuOf(batches, fresh)
  const take = (await cpuOf(batches, () => { for (const span of parseOtlpTraces(JSON.parse(fresh().toString()), NODE)!.spans) store.add(span) }) - made) / REQUESTS
  const gateway = new GatewayMetrics()
  const labels = ['chat', TRACER_NAME, 'tiny', 'e-pd', undefined]
  const traceId = ID_MARK.repeat(4)
  const counted = await cpuOf(calls, () => {
    gateway.stages.record(0.01, ['encode', NODE, 'ok'])
    gateway.stages.record(0.1, ['decode', NODE, 'ok'])
    gateway.durations.record(0.12, labels, traceId)
    gateway.firstTokens.record(0.05, labels, traceId)
    gateway.firstChunks.record(0.05, labels, traceId)
    gateway.perTokens.record(0.01, labels, traceId)
    gateway.tokens.record(98, ['chat', TRACER_NAME, 'tiny', 'input'])
    gateway.tokens.record(2, ['chat', TRACER_NAME, 'tiny', 'output'])
  })
  return { spans, idle, take, metrics: counted }
}

export async function run (bench: BenchContext): Promise<string> {
  const body = await engineBody(REQUESTS)
  const rounds: Costs[] = []
  for (let round = 0; round < bench.rounds; round++) {
    bench.log(`  round ${round + 1} of ${bench.rounds}`)
    rounds.push(await measureCosts(bench, bench.quick ? 10_000 : 40_000, body))
  }
  const of = (key: keyof Costs): number => median(rounds.map(one => one[key]))
  const whole = await measureWhole(bench)
  bench.log('  page')
  const page = await measurePage(bench)
  return [
    '## Telemetry',
    '',
    `CPU of the gateway for a streamed request with one picture: its own 5 spans into the memory store, and the ${ENGINE_SPANS} spans its engines send (their JSON, ${REQUESTS} requests a call, ${Math.round(body.length / REQUESTS / ENGINE_SPANS)} bytes a span).`,
    '',
    table(['', 'us/request'], [
      ['spans of the gateway', of('spans') - of('idle')],
      ['spans of the engines', of('take')],
      ['tracing in all', of('spans') - of('idle') + of('take')],
      ['the same calls without an SDK', of('idle')],
      ['metrics: 8 histograms', of('metrics')]
    ]),
    '',
    whole,
    '',
    page
  ].join('\n')
}
