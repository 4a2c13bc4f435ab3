/**
 * `npm run test:vllm`: real vLLM servers behind the gateway. Not in CI, which asks the same of a fake that replays them
 * (test/adapters/vllm-house.test.ts). Installs nothing.
 */
import { spawnSync } from 'node:child_process'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import t, { type Test } from 'tap'
import { bearsMalice, equalsPlain, losesOneToTruncatedFiles, sharesVisionWork, survivesConsumer, survivesEncoder, survivesPrefill, throwsOldHandlesAway } from './scenarios.ts'
import { VllmServers } from './servers.ts'
import { oneWaterfall, startCollector } from './spans.ts'

const HELP = `npm run test:vllm -- --model FOLDER [--only e-pd|e-p-d|mooncake|spans]

Starts vLLM servers on loopback, at most four at a time, and tests the gateway in front of them: 10 to 30 minutes on a CPU.

  --model FOLDER  a vision-language model; a tiny one with random weights will do. Also EPD_VLLM_MODEL
  --only NAME     one topology; spans: E -> PD once, whose spans must be one tree with the gateway's; mooncake, E -> PD with ECMooncakeConnector, runs only when it is named; on a CPU PD loads nothing (0.32.0):  pip install mooncake-transfer-engine
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
const only = (name: string): boolean => values.only === name
const collector = only('spans') ? await startCollector(t) : undefined
const servers = await VllmServers.prepare({ command, model, extra, patience: PATIENCE_MS, ...(collector === undefined ? {} : { otlp: collector.url }) })
t.teardown(() => servers.close())
t.comment(`vllm ${version.stdout.trim().split('\n').at(-1)}, logs in ${servers.logs}`)
/** A test that takes as long as the servers do. */
const real = async (name: string, run: (t: Test) => Promise<void>): Promise<void> => { await t.test(name, { timeout: 0 }, run) }
const always = { routing: { disaggregate: 'always' } } as const
if (collector === undefined) await servers.start('plain', ...(only('mooncake') ? [] : ['e'] as const))
else {
  await servers.start('e', 'pd')
  await real('spans of vLLM and of the gateway are one tree', async t => { await oneWaterfall(t, servers.house('e', 'pd'), collector) })
}

if (values.only === undefined || only('e-pd')) {
  await servers.start('pd')
  const house = servers.house('e', 'pd')
  await real('E -> PD, raw: 40 pictures equal the plain server', async t => { await equalsPlain(t, house, { count: 40, seed: 1, plan: 'e-pd', options: { vllm: { handoff: 'raw' } } }) })
  await real('E -> PD, rewritten: 40 pictures equal the plain server', async t => { await equalsPlain(t, house, { count: 40, seed: 2, plan: 'e-pd', options: { vllm: { handoff: 'rewrite' } } }) })
  await real('no client harms E and PD', async t => { await bearsMalice(t, house, { vllm: { handoff: 'raw' } }) })
  await real('no client harms E and PD, rewritten', async t => { await bearsMalice(t, house, { vllm: { handoff: 'rewrite' } }) })
  await real('many requests at once: PD encodes what E was not given', async t => { await sharesVisionWork(t, house, 4) })
  await real('E is killed', async t => { await survivesEncoder(t, house, 5) })
  await real('PD is killed, and files are deleted', async t => { await survivesConsumer(t, house, 6) })
  await real('files are truncated', async t => { await losesOneToTruncatedFiles(t, house, 8) })
  await servers.stop('pd')
}

if (values.only === undefined || only('e-p-d')) {
  await servers.start('p', 'd')
  const house = servers.house('e', 'p', 'd')
  await real('E -> P -> D: 40 pictures equal the plain server', async t => { await equalsPlain(t, house, { count: 40, seed: 3, plan: 'e-p-d', options: always }) })
  await real('no client harms E, P and D', async t => { await bearsMalice(t, house, always) })
  await real('a handle is older than its lease', async t => { await throwsOldHandlesAway(t, house, 9, async handoff => { await delay(P_KEEPS_MS); return handoff }) })
  await real('D is killed', async t => { await survivesConsumer(t, house, 10, always) })
  await real('P is killed', async t => { await survivesPrefill(t, house, 7) })
}

if (only('mooncake')) {
  await servers.start('em', 'pdm')
  const house = servers.house('em', 'pdm')
  for (const [i, handoff] of (['auto', 'raw'] as const).entries()) {
    await real(`features are pushed, ${handoff}: 40 pictures equal the plain server`, async t => { await equalsPlain(t, house, { count: 40, seed: 11 + i, plan: 'e-pd', options: { vllm: { handoff } } }) })
  }
  await real('no client harms E and PD', async t => { await bearsMalice(t, house, {}, /^(400|503)$/) })
}
