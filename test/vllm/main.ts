/**
 * `npm run test:vllm`: real vLLM servers behind the gateway. Not in CI, which asks the same of a fake that replays them
 * (test/adapters/vllm-house.test.ts). Installs nothing.
 */
import { spawnSync } from 'node:child_process'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import t from 'tap'
import { bearsMalice, equalsPlain, losesOneToTruncatedFiles, sharesVisionWork, survivesConsumer, survivesEncoder, survivesPrefill, throwsOldHandlesAway } from './scenarios.ts'
import { VllmServers } from './servers.ts'

const HELP = `npm run test:vllm -- --model FOLDER [--only e-pd|e-p-d]

Starts vLLM servers on loopback, at most four at a time, and tests the gateway in front of them: 10 to 30 minutes on a CPU.

  --model FOLDER  a vision-language model; a tiny one with random weights will do. Also EPD_VLLM_MODEL
  --only NAME     one topology
  EPD_VLLM        the vllm command (default: vllm in PATH). It is installed by:  pip install vllm nixl
  EPD_VLLM_ARGS   arguments for every server, such as  --kv-cache-memory-bytes 64M  on a CPU
`

const { values } = parseArgs({ options: { model: { type: 'string' }, only: { type: 'string' }, help: { type: 'boolean', short: 'h', default: false } } })
const command = process.env.EPD_VLLM ?? 'vllm'
const model = values.model ?? process.env.EPD_VLLM_MODEL

if (values.help || model === undefined) {
  process.stderr.write(HELP)
  process.exit(values.help ? 0 : 2)
}
const version = spawnSync(command, ['--version'], { encoding: 'utf8' })
if (version.status !== 0) {
  process.stderr.write(`${command} does not run: ${version.error?.message ?? version.stderr.trim().split('\n').at(-1)}\nInstall it by:  pip install vllm nixl\n`)
  process.exit(1)
}

const PATIENCE_MS = 15 * 60_000
/** P frees its blocks after 30 s. */
const P_KEEPS_MS = 32_000
t.setTimeout(0)
const extra = (process.env.EPD_VLLM_ARGS ?? '').split(/\s+/).filter(word => word !== '')
const servers = await VllmServers.prepare({ command, model, extra, patience: PATIENCE_MS })
t.teardown(() => servers.close())
t.comment(`vllm ${version.stdout.trim().split('\n').at(-1)}, logs in ${servers.logs}`)
await servers.start('plain', 'e')

if (values.only !== 'e-p-d') {
  await servers.start('pd')
  const house = servers.house('e', 'pd')
  const long = { timeout: 0 }
  await t.test('E -> PD, raw: 40 pictures equal the plain server', long, async t => { await equalsPlain(t, house, { count: 40, seed: 1, plan: 'e-pd', options: { vllm: { handoff: 'raw' } } }) })
  await t.test('E -> PD, rewritten: 40 pictures equal the plain server', long, async t => { await equalsPlain(t, house, { count: 40, seed: 2, plan: 'e-pd', options: { vllm: { handoff: 'rewrite' } } }) })
  await t.test('no client harms E and PD', long, async t => { await bearsMalice(t, house, { vllm: { handoff: 'raw' } }) })
  await t.test('no client harms E and PD, rewritten', long, async t => { await bearsMalice(t, house, { vllm: { handoff: 'rewrite' } }) })
  await t.test('many requests at once: PD encodes what E was not given', long, async t => { await sharesVisionWork(t, house, 4) })
  await t.test('E is killed', long, async t => { await survivesEncoder(t, house, 5) })
  await t.test('PD is killed, and files are deleted', long, async t => { await survivesConsumer(t, house, 6) })
  await t.test('files are truncated', long, async t => { await losesOneToTruncatedFiles(t, house, 8) })
  await servers.stop('pd')
}

if (values.only !== 'e-pd') {
  await servers.start('p', 'd')
  const house = servers.house('e', 'p', 'd')
  const always = { routing: { disaggregate: 'always' } } as const
  const long = { timeout: 0 }
  await t.test('E -> P -> D: 40 pictures equal the plain server', long, async t => { await equalsPlain(t, house, { count: 40, seed: 3, plan: 'e-p-d', options: always }) })
  await t.test('no client harms E, P and D', long, async t => { await bearsMalice(t, house, always) })
  await t.test('a handle is older than its lease', long, async t => { await throwsOldHandlesAway(t, house, 9, async handoff => { await delay(P_KEEPS_MS); return handoff }) })
  await t.test('D is killed', long, async t => { await survivesConsumer(t, house, 10, always) })
  await t.test('P is killed', long, async t => { await survivesPrefill(t, house, 7) })
}
