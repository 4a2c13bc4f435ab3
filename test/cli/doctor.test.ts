/** `fastify-epd doctor`: of nodes that are described, of a configuration's nodes, and of a gateway's. */
import { join } from 'node:path'
import t from 'tap'
import type { NodeInfo, Role } from '../../adapters/adapter.ts'
import { diagnose, type Diagnosis, type Patient } from '../../plugin/cli/doctor/diagnosis.ts'
import { patientsOfConfig } from '../../plugin/cli/doctor/sources.ts'
import { runCli, runCommand } from '../helper/cli.ts'
import { FakeLmdeploy } from '../helper/fake-lmdeploy.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway } from '../helper/fake-gateway.ts'
import { FakeSglangEncoder, FakeSglangLm } from '../helper/fake-sglang.ts'
import { FakeVllm, SharedFolder } from '../helper/fake-vllm.ts'
import { COMPLETION, json, modelServer } from '../helper/model-server.ts'

const FORMATS: Readonly<Record<Role, Pick<NodeInfo, 'produces' | 'accepts'>>> = {
  encoder: { produces: ['features:x/1'], accepts: [] },
  hybrid: { produces: [], accepts: ['features:x/1'] },
  prefill: { produces: ['kv:x/1'], accepts: ['features:x/1'] },
  decode: { produces: [], accepts: ['kv:x/1'] }
}

function patient (id: string, role: Role, more: Partial<Patient> = {}, info: Partial<NodeInfo> = {}): Patient {
  const models = more.models ?? ['m']
  return { id, role, adapter: 'pytorch', models, state: 'healthy', notes: [], resting: [], links: new Map(), info: { status: 'healthy', models, role, backend: 'x', vision: 'features', ...FORMATS[role], ...info }, ...more }
}

const problemsOf = ({ problems }: Diagnosis): string => problems.map(({ what, remedy }) => `${what} / ${remedy}`).join('\n')
const pairOf = ({ pairs }: Diagnosis, from: string, to: string): string | undefined => {
  const pair = pairs.find(pair => pair.from === from && pair.to === to)
  return pair === undefined ? undefined : `${pair.works ? 'ok' : 'no'}: ${pair.how}`
}

t.test('nodes that fit have no problems, and each plan that they can serve is named', async t => {
  const all = diagnose([patient('e', 'encoder'), patient('h', 'hybrid', {}, { vision: 'full' }), patient('p', 'prefill'), patient('d', 'decode')])
  t.equal(problemsOf(all), '')
  t.same(all.models, [{ model: 'm', text: ['pd (1 node)', 'p-d (1 pair)'], media: ['e-pd (1 pair)', 'e-p-d (1 chain)', 'hybrid, without encoder (1 node)'] }])
  t.equal(all.pairs.length, 3)
  t.equal(problemsOf(diagnose([patient('h', 'hybrid')])), '', 'a language model alone')
  t.match(diagnose([patient('h', 'hybrid', { adapter: 'openai' }, { backend: 'openai (vllm)' })]).hints, [/h is a server of vllm: without adapter/])
  t.equal(problemsOf(diagnose([patient('d', 'decode', {}, { standalone: true })])), '', 'a decode node that can do without')
  t.equal(problemsOf(diagnose([patient('h', 'hybrid', { state: 'draining' }), patient('h2', 'hybrid')])), '', 'one that is drained on purpose')
})

t.test('each reason why two can not work together is given', async t => {
  const cases: ReadonlyArray<readonly [from: Patient, to: Patient, how: RegExp]> = [
    [patient('e', 'encoder', { models: ['a', 'b'] }), patient('h', 'hybrid', { models: ['c'] }), /they serve different models: a, b and c/],
    [patient('e', 'encoder', {}, { fingerprint: '1' }), patient('h', 'hybrid', {}, { fingerprint: '2' }), /differ \(1 and 2\)/],
    [patient('e', 'encoder', { state: 'unhealthy' }), patient('h', 'hybrid'), /e is unhealthy/],
    [patient('e', 'encoder', { adapter: 'openai' }, { produces: [] }), patient('h', 'hybrid'), /e hands no features on: the adapter openai does no disaggregation/],
    [patient('e', 'encoder'), patient('h', 'hybrid', { adapter: 'turbomind' }, { backend: 'lmdeploy turbomind', accepts: [] }), /h takes no features: LMDeploy has no encoder role/],
    [patient('e', 'encoder'), patient('h', 'hybrid', { adapter: 'sglang' }, { accepts: [] }), /--language-only and --encoder-urls/],
    [patient('p', 'prefill', { adapter: 'turbomind' }, { produces: [] }), patient('d', 'decode'), /p hands no KV blocks on: TurboMind has no disaggregated/],
    [patient('p', 'prefill'), patient('d', 'decode', { adapter: 'sglang' }, { accepts: [] }), /d takes no KV blocks: start it with --disaggregation-mode decode/],
    [patient('p', 'prefill', { notes: ['its own words'] }, { produces: [] }), patient('d', 'decode'), /its own words/],
    [patient('e', 'encoder'), patient('h', 'hybrid', {}, { accepts: ['features:y/1', 'kv:x/1'] }), /one sends features:x\/1, the other takes features:y\/1:/],
    [patient('e', 'encoder', { links: new Map([['h', { state: 'refused', reason: 'no way' }]]) }), patient('h', 'hybrid'), /link refused: no way/]
  ]
  for (const [from, to, how] of cases) {
    const found = diagnose([from, to])
    t.match(pairOf(found, from.id, to.id), new RegExp(`^no: .*${how.source}`))
    t.not(found.problems.length, 0)
  }
  t.match(pairOf(diagnose([patient('e', 'encoder', { links: new Map([['h', { state: 'linked', transport: 'zmq+ipc' }]]) }), patient('h', 'hybrid')]), 'e', 'h'), 'ok: features:x/1, linked over zmq+ipc')
})

t.test('nodes of no use, models without nodes and ill nodes are problems with a remedy', async t => {
  t.match(problemsOf(diagnose([patient('e', 'encoder')])), /e \(encoder\) is of no use: there is no hybrid or prefill node[^]*no node can answer requests for m \/ only encoders have it/)
  t.match(problemsOf(diagnose([patient('p', 'prefill'), patient('h', 'hybrid')])), /p \(prefill\) is of no use: there is no decode node/)
  t.match(problemsOf(diagnose([patient('h', 'hybrid', { state: 'unhealthy', notes: ['h refuses connections'] })])), /h is unhealthy: h refuses connections \/ start it/)
  t.match(problemsOf(diagnose([patient('h', 'hybrid', { state: 'initialising' })])), /wait until it has loaded its model/)
  t.match(problemsOf(diagnose([patient('h', 'hybrid', { resting: ['decode open'] })])), /h rests after failures \(decode open\)/)
  t.match(problemsOf(diagnose([patient('e', 'encoder'), patient('h', 'hybrid', {}, { accepts: [] })])), /no node can answer requests with pictures for m, though there are encoders/)
})

t.test('one engine under two URLs is a problem; epochs of other servers, and engines without one, are not', async t => {
  const ours = { backend: 'fastify-epd/1 pytorch' }
  const nodes = [patient('e', 'encoder', {}, { ...ours, epoch: 7 }), patient('a', 'hybrid', {}, { ...ours, epoch: 8 }), patient('b', 'hybrid', {}, { ...ours, epoch: 8 }), patient('c', 'hybrid', {}, ours), patient('d', 'hybrid', {}, ours)]
  t.match(problemsOf(diagnose(nodes)), /^b and a are one engine under two URLs \/ .*remove one[^\n]*$/)
  t.equal(problemsOf(diagnose([patient('a', 'hybrid', {}, { epoch: 1 }), patient('b', 'hybrid', {}, { epoch: 1 })])), '')
})

t.test('whatever the nodes say, each is in the findings, and a pair that works makes its encoder useful', async t => {
  const roles: Role[] = ['encoder', 'prefill', 'decode', 'hybrid']
  for (let n = 0; n < 4 ** 4; n++) {
    const nodes = Array.from({ length: 4 }, (_, i) => {
      const role = roles[Math.floor(n / 4 ** i) % 4]!
      return patient(`n${i}`, role, { models: i === 3 ? [] : ['m'], state: (n + i) % 5 === 0 ? 'unhealthy' : 'healthy', info: (n + i) % 7 === 0 ? undefined : patient('', role).info })
    })
    const { pairs, problems, models } = diagnose(nodes)
    for (const { id, role, state } of nodes) {
      const useless = problems.some(({ what }) => what.startsWith(`${id} `) && what.includes('of no use'))
      if (role === 'encoder' && state === 'healthy') t.equal(useless, !pairs.some(({ from, works }) => from === id && works), `${n} ${id}`)
    }
    t.ok(models.length <= 1)
  }
})

t.test('vLLM, SGLang, LMDeploy and plain servers are asked, and what they can do together is found', async t => {
  const folder = new SharedFolder()
  const [e, pd, encoder, languageOnly, plain] = await Promise.all([
    FakeVllm.start(t, { server: 'e', folder }), FakeVllm.start(t, { server: 'pd', folder }),
    FakeSglangEncoder.start(t), FakeSglangLm.start(t, { languageOnly: true, encoderUrls: ['http://gw/sglang/v/0'] }),
    modelServer(t, (_request, response) => { json(response, 200, COMPLETION) })
  ])
  const turbomind = await FakeLmdeploy.start({ backend: 'turbomind' })
  t.teardown(() => turbomind.close())
  const found = diagnose(await patientsOfConfig({
    embedded: false,
    nodes: [
      { url: e.url, role: 'encoder', adapter: 'vllm' }, { url: pd.url, role: 'hybrid' }, { url: encoder.url, role: 'encoder', adapter: 'sglang' },
      { url: languageOnly.url, adapter: 'sglang' }, { url: plain.url, adapter: 'openai' }, { url: turbomind.url }
    ]
  }, () => {}))
  t.ok(found.nodes.every(({ state }) => state === 'healthy'), JSON.stringify(found.nodes.map(({ id, notes }) => [id, notes])))
  t.match(found.nodes.map(({ adapter }) => adapter), ['vllm', 'vllm', 'sglang', 'sglang', 'openai', 'turbomind'], 'adapters that are not named are detected')
  t.match(pairOf(found, e.url, pd.url), /^ok: features:vllm-ec\/1/)
  t.match(pairOf(found, encoder.url, languageOnly.url), /^ok: the language server calls the encoder through the gateway/)
  t.match(pairOf(found, encoder.url, plain.url), /^no: .*the adapter openai does no disaggregation/)
  t.match(pairOf(found, encoder.url, turbomind.url), /^no: .*LMDeploy has no encoder role/)
  t.match(found.hints, [/vLLM reports no connectors/])
})

t.test('the command examines a file, a gateway, or both, and ends with 1 when there are problems', async t => {
  const [encoder, hybrid, other] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t), FakeNode.start(t, { fingerprint: 'another\x1b[2J' })])
  const { url } = await buildGateway(t, { nodes: [encoder, hybrid, other] })
  const server = await modelServer(t, (_request, response) => { json(response, 200, COMPLETION) })
  const dir = t.testdir({
    'good.json': JSON.stringify({ nodes: [{ url: server.url, adapter: 'openai' }] }),
    'down.json': JSON.stringify({ nodes: [{ url: 'http://127.0.0.1:1' }] }),
    'none.json': '{}'
  })
  const doctor = async (...args: string[]): Promise<{ code: number | null, stdout: string, stderr: string }> => await runCommand(['doctor', ...args], { cwd: dir })
  const [gateway, good, down, none, both, machine, absent] = await Promise.all([
    runCli(['doctor', '--url', url]), doctor('--config', 'good.json'), doctor('--config', 'down.json'), doctor('--config', 'none.json'),
    doctor('--config', 'good.json', '--url', url), doctor('--config', 'good.json', '--json'), doctor('--url', 'http://127.0.0.1:1')
  ])
  t.equal(gateway.code, 0, 'the encoder has a partner')
  t.match(gateway.stdout, new RegExp(`ok +${encoder.url} -> ${hybrid.url} +features +features:fake/1, linked over fake`))
  t.match(gateway.stdout, new RegExp(`NO +${encoder.url} -> ${other.url} +features +their versions, models or processors differ \\(f and another \\[2J\\)`))
  t.match(gateway.stdout, /text: pd \(2 nodes\); pictures: e-pd \(1 pair\)[^]*no problems found\n$/)
  t.match(good, { code: 0, stdout: /configuration good.json[^]*ok +http.* hybrid +openai +m [^]*no problems found/, stderr: '' })
  t.match(down, { code: 1, stdout: /NO +http:\/\/127.0.0.1:1[^]*problems\n {2}- http:\/\/127.0.0.1:1 is unhealthy: .*refuses connections\n {4}start it/ })
  t.match(none, { code: 0, stdout: /serve starts engines of its own/ })
  t.match(both, { code: 1, stdout: /the gateway does not have http.*\n.*\/epd\/reload/ })
  t.match(JSON.parse(machine.stdout), { sources: [{ nodes: [{ id: server.url, state: 'healthy' }], problems: [] }], problems: [] })
  t.match(absent, { code: 1, stdout: '', stderr: /can't reach the gateway/ })
  // eslint-disable-next-line no-control-regex
  t.notMatch(gateway.stdout, /[\x00-\x09\x0b-\x1f]/)
  t.match(await doctor('--config', join(dir, 'nowhere.json')), { code: 2, stderr: /can't read/ })
})
