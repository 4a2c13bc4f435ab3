import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { metrics } from '@opentelemetry/api'
import { AggregationTemporality, InMemoryMetricExporter, MeterProvider, PeriodicExportingMetricReader } from '@opentelemetry/sdk-metrics'
import t from 'tap'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import { METRIC } from '../../plugin/telemetry/instruments.ts'
import { GatewayMetrics } from '../../plugin/telemetry/metrics.ts'
import { packageRoot } from '../helper/package-root.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { metric } from '../helper/metrics.ts'

const PATH = '/v1/chat/completions'

/** A gateway through which all kinds of requests have gone. */
async function used (t: import('tap').Test): Promise<{ url: string, nodes: FakeNode[], text: () => Promise<string>, app: Awaited<ReturnType<typeof buildGateway>>['app'] }> {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const { url, app } = await buildGateway(t, { nodes, options: { bypass: 'never', admission: { visionTokens: 100_000, queue: 0 } } })
  const answers = [
    await post(url + PATH, chat('?', pictureUrl(1))),
    await post(url + PATH, { ...chat('?'), stream: true }),
    await post(url + PATH, { ...chat('?'), model: 'invented-by-a-client' })
  ]
  for (const answer of answers) await answer.arrayBuffer()
  nodes[2]!.generateFaults.push('gone')
  nodes[0]!.encodeFaults.push('failed')
  nodes[1]!.encodeFaults.push('failed')
  for (let n = 2; n < 8; n++) await (await post(url + PATH, chat('?', pictureUrl(n)))).arrayBuffer()
  return { url, nodes, app, text: async () => await (await fetch(`${url}/metrics`)).text() }
}

t.test('GET /metrics has requests, stages, retries, caches, breakers and admission without any SDK', async t => {
  const { text, nodes } = await used(t)
  const page = await text()
  const stage = (labels: Record<string, string>): number | undefined => metric(page, 'epd_stage_duration_seconds_count', labels)
  t.equal(metric(page, 'epd_requests_total', { epd_topology: 'pd', epd_outcome: 'ok' }), 1)
  t.equal(metric(page, 'gen_ai_client_operation_duration_seconds_count', { gen_ai_request_model: 'vlm', epd_topology: 'pd' }), 1)
  t.equal(metric(page, 'gen_ai_client_operation_time_to_first_chunk_seconds_count', { epd_topology: 'pd' }), 1, 'of streams only')
  t.equal(metric(page, 'gen_ai_client_operation_duration_seconds_count', { epd_topology: 'none', error_type: 'EPD_ERR_MODEL_NOT_FOUND' }), 1)
  t.notMatch(page, /invented-by-a-client/, 'a client can not make series')
  t.ok(stage({ epd_stage: 'encode', epd_outcome: 'ok' })! > 0)
  t.equal(stage({ epd_stage: 'encode', epd_outcome: 'unavailable', epd_node: nodes[0]!.url }), 1)
  t.equal(stage({ epd_stage: 'decode', epd_outcome: 'features_gone', epd_node: nodes[2]!.url }), 1)
  t.ok(metric(page, 'epd_retries_total', { error_type: 'features_gone' })! >= 1)
  t.ok(metric(page, 'epd_encode_moves_total')! >= 1)
  t.equal(metric(page, 'epd_breaker_state', { epd_node: nodes[0]!.url, epd_stage: 'encode' }), 0)
  t.equal(metric(page, 'epd_link_up', { epd_peer: nodes[0]!.url, epd_node: nodes[2]!.url }), 1)
  t.equal(metric(page, 'epd_node_up', { epd_node: nodes[1]!.url, epd_role: 'encoder' }), 1)
  t.equal(metric(page, 'epd_admission_vision_tokens'), 0)
  t.equal(metric(page, 'epd_requests_in_flight'), 0)
})

t.test('histograms have the bounds of the conventions and add up', async t => {
  const { text } = await used(t)
  const page = await text()
  const buckets = page.split('\n').filter(line => line.startsWith('gen_ai_client_operation_duration_seconds_bucket') && line.includes('epd_topology="pd"'))
  t.strictSame(buckets.map(line => /le="([^"]+)"/.exec(line)![1]), [...new GatewayMetrics().durations.bounds.map(String), '+Inf'])
  t.match(buckets.at(-1), / 1$/)
})

t.test('an open breaker and a refusal show', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  let release = (): void => {}
  const hold = new Promise<void>(resolve => { release = resolve })
  const { url, app } = await buildGateway(t, { nodes, options: { bypass: 'never', admission: { visionTokens: 1, queue: 0 } } })
  nodes[0]!.encodeFaults.push({ hold })
  const first = post(url + PATH, chat('?', pictureUrl(1)))
  while (app.epd.gateway.admission.stats.inFlight === 0) await new Promise(resolve => setImmediate(resolve))
  t.equal((await post(url + PATH, chat('?', pictureUrl(2)))).status, 429)
  release()
  t.equal((await first).status, 200)
  for (let n = 0; n < 5; n++) {
    nodes[0]!.encodeFaults.push('reset', 'reset')
    await (await post(url + PATH, chat('?', pictureUrl(n)))).arrayBuffer()
  }
  const page = await (await fetch(`${url}/metrics`)).text()
  t.equal(metric(page, 'epd_admission_refused_total', { epd_reason: 'queue_full' }), 1)
  t.equal(metric(page, 'epd_admission_refused_total'), 1)
  t.ok(metric(page, 'epd_admission_wait_seconds_count', { epd_outcome: 'admitted' })! > 1)
  t.equal(metric(page, 'epd_breaker_state', { epd_node: nodes[0]!.url, epd_stage: 'encode' }), 2)
  t.equal(metric(page, 'epd_requests_total', { epd_topology: 'none', epd_outcome: 'refused' }), 1)
})

t.test('an SDK of the application gets the same metrics, and each gateway keeps its own page', async t => {
  const exporter = new InMemoryMetricExporter(AggregationTemporality.CUMULATIVE)
  const provider = new MeterProvider({ readers: [new PeriodicExportingMetricReader({ exporter, exportIntervalMillis: 3_600_000 })] })
  metrics.setGlobalMeterProvider(provider)
  t.teardown(async () => {
    metrics.disable()
    await provider.shutdown()
  })
  const one = await used(t)
  const other = await buildGateway(t)
  await provider.forceFlush()
  const names = exporter.getMetrics().flatMap(({ scopeMetrics }) => scopeMetrics).filter(({ scope }) => scope.name === 'fastify-epd').flatMap(({ metrics }) => metrics.map(({ descriptor }) => descriptor.name))
  for (const name of [METRIC.requestDuration, METRIC.timeToFirstChunk, METRIC.stageDuration, METRIC.requests, METRIC.nodeUp, METRIC.breakerState]) t.ok(names.includes(name), name)
  t.ok(metric(await one.text(), 'epd_requests_total', { epd_topology: 'pd' })! > 0)
  t.equal(metric(await (await fetch(`${other.url}/metrics`)).text(), 'epd_requests_total', { epd_topology: 'pd' }), 0)
})

t.test('docs/tracing.md has every span, attribute and metric, and no other', async t => {
  const text = await readFile(join(packageRoot(), 'docs', 'tracing.md'), 'utf8')
  const told = new Set([...text.matchAll(/`((?:epd|engine|gen_ai)\.[a-z_.]+)`/g)].map(found => found[1]!))
  const names: string[] = [...Object.values(SPAN), ...Object.values(ATTR), ...Object.values(METRIC)]
  for (const name of names) t.ok(text.includes(`\`${name}\``), `${name} is documented`)
  t.strictSame([...told].filter(name => !names.includes(name)), [], 'nothing is documented that does not exist')
})
