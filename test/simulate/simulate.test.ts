import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import t from 'tap'
import { simulate, type Outcome, type Setting } from './simulate.ts'

const MAIN = new URL('./main.js', import.meta.url).pathname
const SETTING: Setting = { stage: 'encode', nodes: 20, gateways: 4, requests: 2_500, keys: 2_000, zipf: 1, load: 0.7, cache: 50, hit: 0.1, bound: 0, seed: 1 }

function byPolicy (setting: Setting): Record<string, Omit<Outcome, 'planUs'>> {
  return Object.fromEntries(simulate(setting).map(({ planUs: _, ...outcome }) => [outcome.policy, outcome]))
}

t.test('pictures that go to the same encoder again are found there', async t => {
  const found = byPolicy(SETTING)
  const [affinity, random, least] = [found.affinity!, found.random!, found['least tokens']!]
  t.ok(affinity.hits > random.hits + 0.2 && affinity.hits > least.hits + 0.2, 'far more of them than elsewhere')
  t.ok(affinity.p50 < random.p50 && affinity.p99 < random.p99)
  const [narrow, wide] = [2_048, 1e6].map(bound => byPolicy({ ...SETTING, nodes: 50, bound }).affinity!)
  t.ok(narrow!.p99 < wide!.p99, 'a bound of the load keeps queues before popular pictures short')
  t.same(byPolicy(SETTING), found, 'the same seed gives the same figures')
  t.notSame(byPolicy({ ...SETTING, seed: 2 }), found)
})

t.test('turns of conversations that go to the same language model again are found there', async t => {
  const found = byPolicy({ ...SETTING, stage: 'decode', zipf: 0.5, keys: 800 })
  t.ok(found.prefix!.hits > found['least-tokens']!.hits + 0.2 && found.prefix!.hits > found.random!.hits + 0.2)
  t.ok(found['least-tokens']!.p99 < found.random!.p99, 'what counts loads waits less than what counts nothing')
})

t.test('where nothing is ever asked for again, no policy finds anything', async t => {
  for (const { hits } of Object.values(byPolicy({ ...SETTING, zipf: 0, keys: 1e7 }))) t.ok(hits < 0.01)
})

t.test('the command prints a line for each policy, and says what is wrong with an option', async t => {
  const { stdout } = await promisify(execFile)(process.execPath, [MAIN, '--nodes', '5', '--requests', '200'])
  t.match(stdout, /^stage encode, nodes 5, .*\n\n\| policy .*\n.*\n\| affinity .*\n\| least tokens, then hash .*\n\| least tokens .*\n\| two by chance .*\n\| random /)
  for (const [args, message] of [[['--nodes', '0'], /--nodes must be a whole number from 1/], [['--load', ''], /--load must be a number from 0\.001/], [['--speed', '1'], /--speed/]] as const) {
    await t.rejects(promisify(execFile)(process.execPath, [MAIN, ...args]), { code: 2, stderr: message })
  }
})
