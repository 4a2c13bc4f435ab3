/**
 * `npm run bench:epd`: real vLLM servers on equal cards behind this gateway, nginx or vLLM's proxy, in several arrangements
 * one after the other, under the same loads. Starts and ends the servers and what is in front of them; installs nothing.
 */
import { spawn, type ChildProcess } from 'node:child_process'
import { closeSync, openSync, readFileSync } from 'node:fs'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { runLoad } from '../../plugin/cli/bench/load.ts'
import type { LoadReport, Spread } from '../../plugin/cli/bench/report.ts'
import { machine, median, table } from '../bench/report.ts'
import { freePort } from '../helper/free-port.ts'
import { busiest, Cards, threadSeconds } from './busy.ts'
import * as fronts from './fronts.ts'
import { means, readTimes } from './stages.ts'

const HELP = `npm run bench:epd -- --model DIR [options]

  --command WORDS     starts one server; its flags follow (default: vllm serve MODEL)
  --flags="WORDS"     flags of every server, e.g. --flags="--dtype bfloat16 --load-format dummy"
  --encoder-flags="WORDS", --language-flags="WORDS"   and of E, and of all others (e.g. of CUDA graphs)
  --arm NAME=ROLE@CARD,...   an arrangement; roles: h (hybrid), e, pd. Repeatable
                      (default: hybrids=h@0,h@1 and e-pd=e@0,pd@1)
  --case PxSIZE:TOKENS@CLIENTS, or PxSIZE:TOKENS~RATE   pictures a request, their edge in pixels, tokens out, and clients
                      in a closed loop or requests a second (Poisson); then perhaps /r0.3, a share of pictures that were
                      sent before, or /t0.5, a share of requests without pictures. Repeatable
                      (default: 1x896:64@1, 1x896:64@32, 4x896:64@32)
  --nginx PATH        measures arrangements without an encoder behind nginx, too (round robin)
  --proxy WORDS       and those with one behind vLLM's own proxy: the command of its disagg_epd_proxy.py
  --seconds 12        of one measurement
  --repeats 3         of each case, with fresh pictures; medians are printed, with the least and the most
  --bypass never      what the gateway may do with pictures in e-pd: never, auto (options.md)
  --start-seconds 600 a server may take to start
  --out DIR           logs of the servers and report.json (default: a new folder, which is printed)
  --budget SECONDS    begins no measurement later than this
`

/** Requests that reach each arrangement before it is measured. */
const WARMUP = 8
const SLO = { sloTtftMs: 2_000, sloTpotMs: 50 }
/** The line with which ECExampleConnector says that a server has loaded an encoder's features, at level DEBUG. */
const LOADED = /Success load encoder cache/g
const ROLES = { h: 'hybrid', e: 'encoder', pd: 'hybrid' } as const
type Role = keyof typeof ROLES

interface Arm { readonly name: string, readonly servers: ReadonlyArray<{ readonly role: Role, readonly card: string }> }
interface Case { readonly name: string, readonly pictures: number, readonly size: number, readonly tokens: number, readonly clients?: number, readonly rate?: number, readonly repeat: number, readonly text: number }
interface Row { readonly arm: Arm, readonly front: string, readonly of: Case, readonly cards: number[][], readonly threads: number[][], readonly stages: string[], readonly reports: Array<Omit<LoadReport, 'results'>>, loaded: number, sent: number }

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    command: { type: 'string' },
    flags: { type: 'string', default: '' },
    'encoder-flags': { type: 'string', default: '' },
    'language-flags': { type: 'string', default: '' },
    arm: { type: 'string', multiple: true, default: ['hybrids=h@0,h@1', 'e-pd=e@0,pd@1'] },
    case: { type: 'string', multiple: true, default: ['1x896:64@1', '1x896:64@32', '4x896:64@32'] },
    seconds: { type: 'string', default: '12' },
    repeats: { type: 'string', default: '3' },
    nginx: { type: 'string' },
    proxy: { type: 'string' },
    bypass: { type: 'string', default: 'never' },
    'start-seconds': { type: 'string', default: '600' },
    budget: { type: 'string', default: 'Infinity' },
    out: { type: 'string' },
    help: { type: 'boolean', short: 'h', default: false }
  }
})
if (values.help || values.model === undefined) {
  process.stderr.write(HELP)
  process.exit(values.help ? 0 : 2)
}
const words = (text: string): string[] => text.split(/\s+/).filter(word => word !== '')
const command = words(values.command ?? `vllm serve ${values.model}`)
const arms = values.arm.map(readArm)
const cases = values.case.map(readCase)
const out = values.out ?? await mkdtemp(join(tmpdir(), 'fastify-epd-bench-'))
const began = performance.now()
const rows: Row[] = []
const cards = new Cards()

function readArm (text: string): Arm {
  const [, name, list] = /^([\w-]+)=(\S+)$/.exec(text) ?? fail(`--arm ${text}: NAME=ROLE@CARD,... is expected`)
  return {
    name: name!,
    servers: list!.split(',').map(one => {
      const [, role, card] = /^(h|e|pd)@(\d+)$/.exec(one) ?? fail(`--arm ${text}: ${one} is no ROLE@CARD; roles are h, e and pd`)
      return { role: role as Role, card: card! }
    })
  }
}

function readCase (name: string): Case {
  const [, pictures, size, tokens, loop, number, repeat, text] = /^(\d+)x(\d+):(\d+)([@~])([\d.]+)(?:\/r([\d.]+))?(?:\/t([\d.]+))?$/.exec(name) ?? fail(`--case ${name}: PxSIZE:TOKENS@CLIENTS or PxSIZE:TOKENS~RATE, then perhaps /rSHARE and /tSHARE, is expected`)
  return { name, pictures: Number(pictures), size: Number(size), tokens: Number(tokens), repeat: Number(repeat ?? 0), text: Number(text ?? 0), ...(loop === '@' ? { clients: Number(number) } : { rate: Number(number) }) }
}

function fail (message: string): never {
  process.stderr.write(`${message}\n`)
  process.exit(2)
}

function log (line: string): void {
  process.stderr.write(`${((performance.now() - began) / 1_000).toFixed(0).padStart(5)} s  ${line}\n`)
}

const running = new Set<ChildProcess>()
/** Of a group of its own: a server is several processes. */
function end (child: ChildProcess, signal: NodeJS.Signals): void {
  try { process.kill(-child.pid!, signal) } catch {}
}
process.once('exit', () => { cards.close(); for (const child of running) end(child, 'SIGKILL') })

interface Server { readonly url: string, readonly role: Role, readonly log: string, readonly child: ChildProcess }

async function launch (arm: Arm, index: number, folder: string): Promise<Server> {
  const { role, card } = arm.servers[index]!
  const port = await freePort()
  const log = join(out, `${arm.name}-${index}-${role}.log`)
  const ec = (ecRole: string): string[] => ['--ec-transfer-config', JSON.stringify({ ec_connector: 'ECExampleConnector', ec_role: ecRole, ec_connector_extra_config: { shared_storage_path: folder } })]
  const own: Record<Role, string[]> = {
    h: words(values['language-flags']),
    e: [...words(values['encoder-flags']), '--enforce-eager', '--no-enable-prefix-caching', '--max-num-batched-tokens', '65536', ...ec('ec_producer')],
    pd: [...words(values['language-flags']), ...ec('ec_consumer')]
  }
  const file = openSync(log, 'w')
  const child = spawn(command[0]!, [...command.slice(1), '--served-model-name', 'vlm', '--host', '127.0.0.1', '--port', String(port), ...words(values.flags), ...own[role]], {
    detached: true,
    stdio: ['ignore', file, file],
    env: {
      ...process.env,
      CUDA_VISIBLE_DEVICES: card,
      VLLM_NO_USAGE_STATS: '1',
      DO_NOT_TRACK: '1',
      // With an EC connector vLLM falls back to the first model runner: all get the same.
      VLLM_USE_V2_MODEL_RUNNER: process.env.VLLM_USE_V2_MODEL_RUNNER ?? '0',
      VLLM_LOGGING_CONFIG_PATH: await loggingConfig()
    }
  })
  closeSync(file)
  child.on('error', error => { fail(`${command[0]}: ${error.message}`) })
  running.add(child)
  return { url: `http://127.0.0.1:${port}`, role, log, child }
}

/** What vLLM does by itself, and the connectors' own lines. */
async function loggingConfig (): Promise<string> {
  const file = join(out, 'logging.json')
  await writeFile(file, JSON.stringify({
    version: 1,
    disable_existing_loggers: false,
    handlers: { console: { class: 'logging.StreamHandler', stream: 'ext://sys.stdout' } },
    loggers: {
      vllm: { handlers: ['console'], level: 'INFO', propagate: false },
      'vllm.distributed.ec_transfer': { handlers: ['console'], level: 'DEBUG', propagate: false }
    }
  }))
  return file
}

async function ready ({ url, log, child }: Server): Promise<void> {
  const end = performance.now() + Number(values['start-seconds']) * 1_000
  while (!(await fetch(`${url}/health`, { signal: AbortSignal.timeout(5_000) }).then(answer => answer.ok, () => false))) {
    if (child.exitCode !== null || child.signalCode !== null) throw new Error(`a server ended while it started; see ${log}`)
    if (performance.now() > end) throw new Error(`${url} does not answer /health; see ${log}`)
    await delay(500)
  }
}

const loads = (servers: readonly Server[]): number => servers.reduce((sum, server) => sum + (readFileSync(server.log, 'utf8').match(LOADED)?.length ?? 0), 0)
const late = (): boolean => performance.now() - began > Number(values.budget) * 1_000

async function measure (arm: Arm): Promise<void> {
  // Memory where there is some: the features of a picture are megabytes.
  const folder = await mkdtemp(join(process.platform === 'linux' ? '/dev/shm' : tmpdir(), 'epd-bench-'))
  const teardowns: Array<() => unknown> = []
  try {
    const servers: Server[] = []
    for (const [index, { card }] of arm.servers.entries()) {
      // A server measures the free memory of its card when it starts.
      if (arm.servers.findIndex(other => other.card === card) < index) await Promise.all(servers.map(ready))
      servers.push(await launch(arm, index, folder))
    }
    await Promise.all(servers.map(ready))
    log(`${arm.name}: ${servers.length} servers are up`)
    const t = { teardown: (end: () => unknown) => teardowns.push(end) }
    const backends = servers.map(({ url, role }) => ({ url, role: ROLES[role] }))
    const place = { out, name: arm.name }
    const encoders = backends.some(({ role }) => role === 'encoder')
    const ways = [await fronts.gateway(t, backends, values.bypass, place)]
    if (values.nginx !== undefined && !encoders) ways.push(await fronts.nginx(t, values.nginx, backends, place))
    if (values.proxy !== undefined && encoders) ways.push(await fronts.proxy(t, words(values.proxy), backends, place))
    for (const of of cases) await measureCase(arm, of, ways, servers)
  } finally {
    for (const end of teardowns) await end()
    for (const child of running) end(child, 'SIGTERM')
    await delay(3_000)
    for (const child of running) end(child, 'SIGKILL')
    running.clear()
    await rm(folder, { recursive: true, force: true })
  }
}

/** The same servers under the same load, behind each way in turns. */
async function measureCase (arm: Arm, of: Case, ways: readonly fronts.Front[], servers: readonly Server[]): Promise<void> {
  const all = ways.map(({ name, url }) => ({ url, row: { arm, front: name, of, cards: [], threads: [], stages: [], reports: [], loaded: 0, sent: 0 } as Row }))
  rows.push(...all.map(({ row }) => row))
  for (let repeat = 0; repeat < Number(values.repeats); repeat++) {
    for (const [way, { url, row }] of all.entries()) {
      if (late()) return
      const before = loads(servers)
      const since = performance.now()
      const urls = [url, ...servers.map(server => server.url)]
      const times = await Promise.all(urls.map(readTimes))
      const threads = servers.map(({ child }) => threadSeconds(child.pid!))
      const warmup = repeat === 0 ? WARMUP : 0
      const { results, ...report } = await runLoad({
        url,
        durationMs: Number(values.seconds) * 1_000,
        concurrency: of.clients,
        rate: of.rate,
        warmup,
        pictures: of.pictures,
        width: of.size,
        maxTokens: of.tokens,
        ignoreEos: true,
        repeat: of.repeat,
        textShare: of.text,
        // Another for each case, way and repeat, the same for each arrangement: fresh pictures, equal loads.
        seed: 1_000 * cases.indexOf(of) + 100 * way + repeat + 1,
        body: { temperature: 0 },
        ...SLO
      })
      row.reports.push(report)
      row.cards.push(arm.servers.flatMap(({ card }) => cards.busy(card, since) ?? []))
      row.threads.push(servers.map(({ child }, index) => busiest(threads[index]!, threadSeconds(child.pid!), performance.now() - since)))
      const later = await Promise.all(urls.map(readTimes))
      row.stages.push(['front', ...servers.map(({ role }) => role)].map((who, index) => `${who}: ${means(times[index]!, later[index]!)}`).join('; '))
      row.sent += results.reduce((sum, { pictures }) => sum + pictures, 0) + warmup * of.pictures
      row.loaded += loads(servers) - before
      log(`${arm.name} ${row.front} ${of.name}: ${report.requestsPerSecond.toFixed(2)} req/s, TTFT p50 ${report.ttftMs?.p50.toFixed(0)} ms, ${report.failed} failed, plans ${JSON.stringify(report.plans)}${report.errors[0] === undefined ? '' : `, ${JSON.stringify(report.errors[0])}`}`)
      await writeFile(join(out, 'report.json'), JSON.stringify({ machine: machine(), values, rows }, null, 1))
    }
  }
}

/** The median, with the least and the most. */
function spread (values: readonly number[], places = 0): string {
  if (values.length === 0) return '-'
  const text = (value: number): string => value.toFixed(places)
  return `${text(median(values))} (${text(Math.min(...values))}–${text(Math.max(...values))})`
}

/** Medians of a figure of each server. */
function perServer (arm: Arm, figures: readonly number[][]): string {
  return figures.flat().length === 0 ? '-' : arm.servers.map(({ role }, index) => `${role} ${median(figures.flatMap(one => one[index] ?? [])).toFixed(0)}`).join(', ')
}

function rendered (): string {
  const times = (reports: Row['reports'], pick: (report: Row['reports'][number]) => Spread | null, key: 'p50' | 'p90' | 'p99', places = 0): string =>
    spread(reports.flatMap(report => pick(report)?.[key] ?? []), places)
  return table(
    ['load', 'arrangement', 'behind', 'requests/s', 'TTFT p50, ms', 'p90', 'p99', 'TPOT p50, ms', 'p99', 'goodput', 'failed', 'features loaded / pictures', 'cards busy, %', 'busiest threads, %', 'plans', 'mean times of the last measurement, ms'],
    cases.flatMap(of => rows.filter(row => row.of === of && row.reports.length > 0).map(({ arm, front, cards, threads, stages, reports, loaded, sent }) => [
      of.name,
      arm.name,
      front,
      spread(reports.map(({ requestsPerSecond }) => requestsPerSecond), 2),
      times(reports, ({ ttftMs }) => ttftMs, 'p50'),
      times(reports, ({ ttftMs }) => ttftMs, 'p90'),
      times(reports, ({ ttftMs }) => ttftMs, 'p99'),
      times(reports, ({ tpotMs }) => tpotMs, 'p50', 1),
      times(reports, ({ tpotMs }) => tpotMs, 'p99', 1),
      spread(reports.flatMap(({ goodput }) => goodput ?? []), 2),
      String(reports.reduce((sum, { failed }) => sum + failed, 0)),
      `${loaded} / ${sent}`,
      perServer(arm, cards),
      perServer(arm, threads),
      Object.entries(reports.reduce<Record<string, number>>((sums, { plans }) => {
        for (const [plan, count] of Object.entries(plans)) sums[plan] = (sums[plan] ?? 0) + count
        return sums
      }, {})).map(([plan, count]) => `${plan} ${count}`).join(', '),
      stages.at(-1) ?? '-'
    ])))
}

await mkdir(out, { recursive: true })
log(`logs are in ${out}`)
let failed = false
for (const arm of arms) {
  if (late()) break
  await measure(arm).catch((error: Error) => { failed = true; log(`${arm.name}: ${error.message}`) })
}
process.stdout.write(`${machine()}\n\n${rendered()}\n`)
process.exit(failed ? 1 : 0)
