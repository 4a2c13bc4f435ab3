/** The commands before servers that answer nearly as a gateway does. */
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { diagnose } from '../../plugin/cli/doctor/diagnosis.ts'
import { patientsOfGateway } from '../../plugin/cli/doctor/sources.ts'
import { breakersOf, lastErrors, modelsOf, nodesOf } from '../../plugin/cli/node-status.ts'
import { table } from '../../plugin/cli/terminal.ts'
import { ratesBetween } from '../../plugin/cli/top/readings.ts'
import { renderComparison } from '../../plugin/cli/trace-comparison.ts'
import { hasErrors, renderTraces } from '../../plugin/cli/trace-list.ts'
import { read } from '../../plugin/cli/trace-source.ts'
import { renderWaterfall } from '../../plugin/cli/waterfall.ts'
import type { TraceSummary } from '../../plugin/traces/summary.ts'
import type { TraceView } from '../../plugin/traces/view.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { seeded } from '../helper/random.ts'
import { until } from '../helper/until.ts'

const ROUNDS = process.env.EPD_TEST_FULL === undefined ? 300 : 5_000
/** They had control characters in ids and states, or a null where a member may be missing. */
const FOUND = [655, 847, 911, 1_011, 1_243, 2_099, 2_519, 3_227, 3_691]
const ODD = [null, true, 7, -1, 1e300, '', 'x', '\x1b[2J', [], [null], {}, { x: 1 }]

/** A copy with one member, anywhere, that is another or is gone. */
function spoilt (value: unknown, random: (below: number) => number): unknown {
  if (typeof value !== 'object' || value === null || random(6) === 0) return ODD[random(ODD.length)]
  const keys = Object.keys(value)
  if (keys.length === 0) return ODD[random(ODD.length)]
  const key = keys[random(keys.length)]!
  const copy: any = Array.isArray(value) ? [...value] : { ...value }
  if (random(8) === 0 && !Array.isArray(value)) delete copy[key]
  else copy[key] = spoilt(copy[key], random)
  return copy
}

t.test('an answer that is not quite a gateway\'s is shown, or refused in words', async t => {
  const [encoder, one] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const { url } = await buildGateway(t, { nodes: [encoder, one] })
  encoder.encodeFaults.push('failed')
  await (await post(`${url}/v1/chat/completions`, chat('Hello', pictureUrl(1)))).text()
  const get = async (path: string): Promise<any> => await (await fetch(url + path)).json()
  const { traces: [{ traceId }] } = await until(async () => { const list = await get('/epd/traces'); return list.traces.length > 0 && !list.traces[0].partial && list }, 'the trace is whole')
  const good = { status: await get('/nodes/status'), list: await get('/epd/traces'), trace: await get(`/epd/traces/${traceId}`) }

  let answers: Record<keyof typeof good, unknown> = good
  // Kept connections are not closed between two requests, however long a busy machine takes over them.
  const server = createServer({ keepAliveTimeout: 0 }, ({ url: path }, response) => { response.end(JSON.stringify(path === '/nodes/status' ? answers.status : path!.startsWith('/epd/traces?') ? answers.list : answers.trace)) }).listen(0, '127.0.0.1')
  t.teardown(() => { server.close() })
  await once(server, 'listening')
  const source = { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}` }
  const shown: ReadonlyArray<() => Promise<string>> = [
    async () => {
      const [nodes, errors] = [await nodesOf(source), await lastErrors(source)]
      const reading = { at: 0, nodes, samples: [] }
      return table([['NODE'], ...nodes.map(node => [node.url, node.role, node.health, modelsOf(node), breakersOf(node), errors.get(node.url) ?? node.notes.join()])]) + JSON.stringify(ratesBetween(reading, reading))
    },
    async () => { const { problems, pairs } = diagnose(await patientsOfGateway(source)); return table([['x'], ...problems.map(({ what }) => [what]), ...pairs.map(({ how }) => [how])]) },
    async () => { const { traces } = (await read<{ traces: TraceSummary[] }>(source, '/epd/traces?limit=9'))!; return renderTraces(traces) + String(traces.some(hasErrors)) },
    async () => { const trace = (await read<TraceView>(source, '/epd/traces/x'))!; return renderComparison(trace, good.trace) + renderComparison(good.trace, trace) + renderWaterfall(trace) }
  ]
  const outcomes = { shown: 0, refused: 0 }
  for (const seed of [...Array(ROUNDS).keys(), ...FOUND]) {
    const random = seeded(seed)
    answers = { status: spoilt(good.status, random), list: spoilt(good.list, random), trace: spoilt(good.trace, random) }
    const show = shown[seed % shown.length]!
    const text = await show().catch((err: Error) => err)
    if (text instanceof Error) {
      outcomes.refused++
      if (!/is not a fastify-epd gateway|traces of another version|keeps no traces/.test(text.message)) t.fail(`${seed}: ${text.stack}`)
    } else {
      outcomes.shown++
      // eslint-disable-next-line no-control-regex
      if (/[\x00-\x09\x0b-\x1f\x7f]/.test(text)) t.fail(`${seed}: control characters`)
    }
  }
  t.ok(outcomes.shown > 20 && outcomes.refused > 20, JSON.stringify(outcomes))
})
