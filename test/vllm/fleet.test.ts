import { readFileSync } from 'node:fs'
import t, { type Test } from 'tap'
import { until } from '../helper/until.ts'
import { Fleet, loads, readArm, type Flags, type Server } from './fleet.ts'

/** In place of vLLM: says how it was started, and answers `/health` on the port that it was given; `--fail` ends it at once. */
const FAKE = `
if (process.argv.includes('--fail')) process.exit(3)
const { VLLM_USE_V2_MODEL_RUNNER: runner, CUDA_VISIBLE_DEVICES: card } = process.env
console.log(JSON.stringify({ argv: process.argv, runner, card }))
console.log('Success load encoder cache for hash x')
require('node:http').createServer((request, response) => response.end('{}')).listen(Number(process.argv[process.argv.indexOf('--port') + 1]), '127.0.0.1')`

function fleetOf (t: Test, more: Partial<Flags> = {}): Fleet {
  const fleet = new Fleet({ command: [process.execPath, '-e', FAKE, '--'], all: [], encoder: [], language: [], kvBuffer: 'cpu', startMs: 60_000, out: t.testdir(), ...more })
  t.teardown(async () => { await fleet.stop() })
  return fleet
}

const armOf = (text: string): NonNullable<ReturnType<typeof readArm>> => readArm(text)!

function startOf ({ log }: Server): { argv: string[], runner: string, card: string } {
  return JSON.parse(readFileSync(log, 'utf8').split('\n')[0]!) as ReturnType<typeof startOf>
}

t.test('an arrangement is a name and roles on cards', async t => {
  t.same(readArm('e-p-d=e@0,p@0,d@1'), { name: 'e-p-d', servers: [{ role: 'e', card: '0' }, { role: 'p', card: '0' }, { role: 'd', card: '1' }] })
  for (const bad of ['', 'x', 'x=', '=h@0', 'x=h', 'x=h@', 'x=q@0', 'x=h@0,', 'x=h@0,q@1', 'x=toString@0', 'x=h@a', 'x y=h@0']) t.equal(readArm(bad), undefined, bad)
})

t.test('a server that two arrangements name is one; two of a kind on one card are two', async t => {
  const [pd, pD, twins] = await fleetOf(t).start([armOf('e-pd=e@0,pd@1'), armOf('e-p-d=e@0,p@0,d@1'), armOf('twins=h@1,h@1')]) as Server[][]
  t.equal(pd![0], pD![0])
  t.equal(new Set([pd, pD, twins].flat().map(server => server!.url)).size, 6)
  t.equal(loads([pd![0]!, twins![1]!]), 2, 'each is asked for what it has loaded')
})

t.test('each role has its connectors, its card and its model runner', async t => {
  const [servers] = await fleetOf(t).start([armOf('all=e@0,pd@1,p@2,d@3,h@4,h2@5')]) as Server[][]
  const connectors = servers!.map(server => {
    const { argv, runner, card } = startOf(server)
    const of = (flag: string, key: string): unknown => argv.includes(flag) ? (JSON.parse(argv[argv.indexOf(flag) + 1]!) as Record<string, unknown>)[key] : undefined
    return [server.backend, card, of('--ec-transfer-config', 'ec_role'), of('--kv-transfer-config', 'kv_role'), runner]
  })
  t.same(connectors, [
    ['encoder', '0', 'ec_producer', undefined, '0'],
    ['hybrid', '1', 'ec_consumer', undefined, '0'],
    ['prefill', '2', 'ec_consumer', 'kv_producer', '0'],
    ['decode', '3', undefined, 'kv_consumer', '0'],
    ['hybrid', '4', undefined, undefined, '0'],
    ['hybrid', '5', undefined, undefined, '1']
  ])
})

t.test('flags of the user count: they come last', async t => {
  const [servers] = await fleetOf(t, { encoder: ['--max-num-batched-tokens', '8192'], language: ['--mine'] }).start([armOf('one=e@0,pd@1')]) as Server[][]
  const [e, pd] = servers!.map(startOf)
  t.equal(e!.argv.at(-1), '8192')
  t.notOk(e!.argv.includes('--mine'))
  t.equal(pd!.argv.at(-1), '--mine')
})

t.test('an arrangement with a server that ends has none, and the others have theirs; at the end all are gone', async t => {
  const fleet = fleetOf(t, { encoder: ['--fail'] })
  const [hybrids, epd] = await fleet.start([armOf('hybrids=h@0'), armOf('e-pd=e@0,h@0')])
  t.match((epd as Error).message, /a server ended while it started; see .*e-0-1\.log/)
  const [server] = hybrids as Server[]
  await fleet.stop()
  await until(async () => await fetch(`${server!.url}/health`).then(() => false, () => true), 'the server is gone')
})
