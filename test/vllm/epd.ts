/**
 * `npm run bench:epd`: real vLLM servers on equal cards behind this gateway, nginx or vLLM's proxy, in several arrangements
 * one after the other, under the same loads. Starts and ends the servers and what is in front of them; installs nothing.
 */
import { mkdir, mkdtemp, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { runLoad } from '../../plugin/cli/bench/load.ts'
import type { LoadReport, Spread } from '../../plugin/cli/bench/report.ts'
import { machine, median, table } from '../bench/report.ts'
import { busiest, Cards, threadSeconds } from './busy.ts'
import { Fleet, loads, readArm, type Arm, type Server } from './fleet.ts'
import * as fronts from './fronts.ts'
import { means, pulledBy, readTimes, type Pulled } from './stages.ts'

const HELP = `npm run bench:epd -- --model DIR [options]

  --command WORDS     starts one server; its flags follow (default: vllm serve MODEL)
  --flags="WORDS"     flags of every server, e.g. --flags="--dtype bfloat16 --load-format dummy"
  --encoder-flags="WORDS", --language-flags="WORDS"   and of E, and of all others (e.g. of CUDA graphs)
  --arm NAME=ROLE@CARD,...   an arrangement; roles: h (hybrid), h2 (hybrid, vLLM's second model runner), e, pd, and p and d,
                      which share KV blocks by NIXL. Repeatable (default: hybrids=h@0,h@1 and e-pd=e@0,pd@1)
  --together          starts the servers of all arrangements at once, one that several name only once, and measures in turns.
                      Needs --kv-cache-memory-bytes: servers that share a card can't measure what is free there
  --kv-buffer cuda    where p and d keep KV blocks: cuda or cpu
  --case PxSIZE:TOKENS@CLIENTS, or PxSIZE:TOKENS~RATE   pictures a request, their edge in pixels, tokens out, and clients
                      in a closed loop or requests a second (Poisson); then perhaps /r0.3, a share of pictures that were
                      sent before, or /t0.5, a share of requests without pictures. Repeatable
                      (default: 1x896:64@1, 1x896:64@32, 4x896:64@32)
  --nginx PATH        measures arrangements without an encoder behind nginx, too (round robin)
  --proxy WORDS       and those with one behind vLLM's own proxy: the command of its disagg_epd_proxy.py
  --seconds 12        of one measurement
  --repeats 3         of each case, with fresh pictures; medians are printed, with the least and the most
  --bypass never      what the gateway may do with pictures where there is an encoder: never, auto (options.md)
  --gateway NAME=JSON options of another gateway before the same servers, e.g. auto={"bypass":"auto"}; hybrids stay behind
                      the first. Repeatable (default: gateway={})
  --start-seconds 600 a server may take to start
  --out DIR           logs of the servers and report.json (default: a new folder, which is printed)
  --budget SECONDS    begins no measurement later than this
`

/** Requests that reach each arrangement before it is measured. */
const WARMUP = 8
const SLO = { sloTtftMs: 2_000, sloTpotMs: 50 }
interface Case { readonly name: string, readonly pictures: number, readonly size: number, readonly tokens: number, readonly clients?: number, readonly rate?: number, readonly repeat: number, readonly text: number }
interface Row { readonly arm: Arm, readonly front: string, readonly of: Case, readonly pulled: Pulled[], readonly cards: number[][], readonly threads: number[][], readonly stages: string[], readonly reports: Array<Omit<LoadReport, 'results'>>, loaded: number, sent: number }

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
    gateway: { type: 'string', multiple: true, default: ['gateway={}'] },
    together: { type: 'boolean', default: false },
    'kv-buffer': { type: 'string', default: 'cuda' },
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
const arms = values.arm.map(text => readArm(text) ?? fail(`--arm ${text}: NAME=ROLE@CARD,... is expected; roles are h, h2, e, pd, p and d`))
const cases = values.case.map(readCase)
const gateways = values.gateway.map(readGateway)
if (values.together && !/--kv-cache-memory(-bytes)?[ =]/.test(values.flags + values['language-flags'])) fail('--together needs --kv-cache-memory-bytes in --flags')
const out = values.out ?? await mkdtemp(join(tmpdir(), 'fastify-epd-bench-'))
const began = performance.now()
const rows: Row[] = []
const cards = new Cards()
process.once('exit', () => { cards.close() })

function readGateway (text: string): fronts.Gateway {
  const [, name, json] = /^([\w-]+)=(.+)$/s.exec(text) ?? fail(`--gateway ${text}: NAME=JSON is expected`)
  try {
    return { name: name!, options: { bypass: values.bypass, ...JSON.parse(json!) as object } }
  } catch (error) {
    return fail(`--gateway ${text}: ${(error as Error).message}`)
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

const late = (): boolean => performance.now() - began > Number(values.budget) * 1_000

interface Side { readonly arm: Arm, readonly servers: readonly Server[], readonly front: fronts.Front }

/** @returns whether all of it could be measured */
async function measure (group: readonly Arm[]): Promise<boolean> {
  const fleet = new Fleet({
    command: words(values.command ?? `vllm serve ${values.model}`),
    all: words(values.flags),
    encoder: words(values['encoder-flags']),
    language: words(values['language-flags']),
    kvBuffer: values['kv-buffer'],
    startMs: Number(values['start-seconds']) * 1_000,
    out
  })
  const kill = (): void => { fleet.signal('SIGKILL') }
  process.once('exit', kill)
  const teardowns: Array<() => unknown> = []
  let good = true
  try {
    const sides: Side[] = []
    for (const [i, servers] of (await fleet.start(group)).entries()) {
      const arm = group[i]!
      try {
        if (servers instanceof Error) throw servers
        log(`${arm.name}: ${servers.length} servers are up`)
        for (const front of await waysTo(servers, { teardown: end => teardowns.push(end) }, arm)) sides.push({ arm, servers, front })
      } catch (error) {
        good = false
        log(`${arm.name}: ${(error as Error).message}`)
      }
    }
    for (const of of cases) await measureCase(of, sides)
  } finally {
    for (const end of teardowns) await end()
    await fleet.stop()
    process.off('exit', kill)
  }
  return good
}

async function waysTo (servers: readonly Server[], t: Parameters<typeof fronts.gateway>[0], { name }: Arm): Promise<fronts.Front[]> {
  const backends = servers.map(({ url, backend }) => ({ url, role: backend }))
  const place = { out, name }
  const encoders = backends.some(({ role }) => role === 'encoder')
  const ways: fronts.Front[] = []
  for (const options of encoders ? gateways : gateways.slice(0, 1)) ways.push(await fronts.gateway(t, backends, options, place))
  if (values.nginx !== undefined && !encoders) ways.push(await fronts.nginx(t, values.nginx, backends, place))
  if (values.proxy !== undefined && encoders) ways.push(await fronts.proxy(t, words(values.proxy), backends, place))
  return ways
}

/** The same load on each side in turns. */
async function measureCase (of: Case, sides: readonly Side[]): Promise<void> {
  const all = sides.map(({ arm, servers, front }) => ({ servers, url: front.url, row: { arm, front: front.name, of, pulled: [], cards: [], threads: [], stages: [], reports: [], loaded: 0, sent: 0 } as Row }))
  rows.push(...all.map(({ row }) => row))
  for (let repeat = 0; repeat < Number(values.repeats); repeat++) {
    for (const [side, { servers, url, row }] of all.entries()) {
      const { arm } = row
      if (late()) return
      const before = loads(servers)
      const since = performance.now()
      const urls = [url, ...servers.map(server => server.url)]
      const decoders = servers.filter(({ backend }) => backend === 'decode').map(server => server.url)
      const pulled = await pulledBy(decoders)
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
        // Another for each case, side and repeat: fresh pictures, equal loads.
        seed: 1_000 * cases.indexOf(of) + 100 * side + repeat + 1,
        body: { temperature: 0 },
        ...SLO
      })
      row.reports.push(report)
      row.cards.push(arm.servers.flatMap(({ card }) => cards.busy(card, since) ?? []))
      row.threads.push(servers.map(({ child }, index) => busiest(threads[index]!, threadSeconds(child.pid!), performance.now() - since)))
      const later = await Promise.all(urls.map(readTimes))
      row.stages.push(['front', ...servers.map(({ role }) => role)].map((who, index) => `${who}: ${means(times[index]!, later[index]!)}`).join('; '))
      row.pulled.push(between(pulled, await pulledBy(decoders)))
      row.sent += results.reduce((sum, { pictures }) => sum + pictures, 0) + warmup * of.pictures
      row.loaded += loads(servers) - before
      log(`${arm.name} ${row.front} ${of.name}: ${report.requestsPerSecond.toFixed(2)} req/s, TTFT p50 ${report.ttftMs?.p50.toFixed(0)} ms, ${report.failed} failed, plans ${JSON.stringify(report.plans)}${report.errors[0] === undefined ? '' : `, ${JSON.stringify(report.errors[0])}`}`)
      await writeFile(join(out, 'report.json'), JSON.stringify({ machine: machine(), values, rows }, null, 1))
    }
  }
}

function between (before: Pulled, after: Pulled): Pulled {
  return { tokens: after.tokens - before.tokens, of: after.of - before.of }
}

function share (pulled: readonly Pulled[]): string {
  const of = pulled.reduce((sum, one) => sum + one.of, 0)
  return of === 0 ? '-' : (100 * pulled.reduce((sum, { tokens }) => sum + tokens, 0) / of).toFixed(0)
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
    ['load', 'arrangement', 'behind', 'requests/s', 'TTFT p50, ms', 'p90', 'p99', 'TPOT p50, ms', 'p99', 'goodput', 'failed', 'of text alone: TTFT p50, ms', 'p99', 'TPOT p99', 'features loaded / pictures', 'prompt tokens pulled, %', 'cards busy, %', 'busiest threads, %', 'plans', 'mean times of the last measurement, ms'],
    cases.flatMap(of => rows.filter(row => row.of === of && row.reports.length > 0).map(({ arm, front, pulled, cards, threads, stages, reports, loaded, sent }) => [
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
      times(reports, ({ byKind }) => byKind?.text.ttftMs ?? null, 'p50'),
      times(reports, ({ byKind }) => byKind?.text.ttftMs ?? null, 'p99'),
      times(reports, ({ byKind }) => byKind?.text.tpotMs ?? null, 'p99', 1),
      `${loaded} / ${sent}`,
      share(pulled),
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
let good = true
for (const group of values.together ? [arms] : arms.map(arm => [arm])) {
  if (late()) break
  good = await measure(group) && good
}
process.stdout.write(`${machine()}\n\n${rendered()}\n`)
process.exit(good ? 0 : 1)
