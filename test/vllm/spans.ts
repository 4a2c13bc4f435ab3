/** The spans of vLLM's servers beside the gateway's: one tree in the gateway, on the terminal and at an OTLP receiver. */
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { Test } from 'tap'
import { readProtobufTraces } from '../../plugin/traces/otlp-protobuf.ts'
import { parseOtlpTraces } from '../../plugin/traces/otlp.ts'
import type { StoredSpan } from '../../plugin/traces/span.ts'
import { post } from '../helper/fake-gateway.ts'
import { runCli } from '../helper/cli.ts'
import { until } from '../helper/until.ts'
import { chat, dataUrl, imagePart, picture, textPart } from './pictures.ts'
import { gatewayBefore, type House } from './scenarios.ts'

/** Stands for an OpenTelemetry Collector: keeps what comes, and hands what vLLM sends on to the gateway. */
export interface Collector {
  readonly url: string
  readonly spans: StoredSpan[]
  gateway: string | undefined
}

export async function startCollector (t: Test): Promise<Collector> {
  const server = createServer((request, response) => {
    const chunks: Buffer[] = []
    request.on('data', (chunk: Buffer) => chunks.push(chunk))
    request.on('end', () => {
      const body = Buffer.concat(chunks)
      const protobuf = request.headers['content-type'] === 'application/x-protobuf'
      collector.spans.push(...parseOtlpTraces(protobuf ? readProtobufTraces(body) : JSON.parse(body.toString()), undefined)!.spans)
      const passed = protobuf && collector.gateway !== undefined ? fetch(collector.gateway, { method: 'POST', headers: { 'content-type': 'application/x-protobuf' }, body }) : Promise.resolve()
      passed.catch(() => {}).finally(() => { response.end(protobuf ? '' : '{}') })
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  const collector: Collector = { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, spans: [], gateway: undefined }
  return collector
}

export async function oneWaterfall (t: Test, house: House, collector: Collector): Promise<void> {
  process.env.OTEL_EXPORTER_OTLP_ENDPOINT = collector.url
  process.env.OTEL_BSP_SCHEDULE_DELAY = '200'
  t.teardown(() => {
    delete process.env.OTEL_EXPORTER_OTLP_ENDPOINT
    delete process.env.OTEL_BSP_SCHEDULE_DELAY
  })
  const { app, url } = await gatewayBefore(t, house)
  collector.gateway = `${url}/epd/otlp/v1/traces`
  const answer = await post(`${url}/v1/chat/completions`, chat([imagePart(dataUrl(picture(1, 448))), textPart('What is it?')], { max_tokens: 6 }))
  await answer.text()
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-plan'), 'e-pd')
  const traceId = answer.headers.get('x-epd-trace-id')!
  const kept = (): readonly Spanned[] => app.epd.traces!.get(traceId)!.spans
  const exported = (): readonly Spanned[] => collector.spans.filter(span => span.traceId === traceId)
  const whole = (spans: readonly Spanned[]): boolean => spans.filter(({ name }) => name === 'llm_request').length === 2 && spans.some(({ name }) => name === 'chat tiny')
  await until(() => whole(kept()) && whole(exported()), 'all spans are there')
  const expected = ['chat tiny', 'chat tiny > epd.decode', 'chat tiny > epd.decode > llm_request', 'chat tiny > epd.encode', 'chat tiny > epd.encode > epd.encode.call', 'chat tiny > epd.encode > epd.encode.call > llm_request', 'chat tiny > epd.plan']
  t.strictSame(paths(kept()), expected, 'in the gateway')
  t.strictSame(paths(exported()), expected, 'at the receiver')
  const { stdout } = await runCli(['trace', traceId, '--url', url])
  t.comment(stdout)
  t.match(stdout, /^ {4}epd\.encode\.call .*\n {6}llm_request .*\n {2}epd\.decode .*\n {4}llm_request /m, 'on the terminal')
}

type Spanned = Pick<StoredSpan, 'spanId' | 'name'> & { readonly parentSpanId: string | null | undefined }

/** Each span with those above it. `epd.receive` is there only where receiving took time. */
function paths (spans: readonly Spanned[]): string[] {
  const byId = new Map(spans.map(span => [span.spanId, span]))
  const path = ({ name, parentSpanId }: Spanned): string => {
    const parent = parentSpanId == null ? undefined : byId.get(parentSpanId)
    return parent === undefined ? name : `${path(parent)} > ${name}`
  }
  return spans.filter(({ name }) => name !== 'epd.receive').map(path).sort()
}
