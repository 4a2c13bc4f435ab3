/**
 * `npm run bench:vllm`: the gateway and vLLM's disagg_epd_proxy.py side by side, one request at a time, before the same
 * real encoder and the same real server that prefills and decodes. Installs nothing and starts no vLLM server.
 */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { loadavg } from 'node:os'
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { machine, median, table, writeSection } from '../bench/report.ts'
import { freePort } from '../helper/free-port.ts'
import { tempFile } from '../helper/temp.ts'
import { until } from '../helper/until.ts'
import { ask, type Told } from './ask.ts'
import { chat, dataUrl, imagePart, picture, textPart, type Part } from './pictures.ts'

const HELP = `npm run bench:vllm -- --encoder URL --hybrid URL --proxy FILE [--python PYTHON] [--rounds 20] [--write]

  --encoder, --hybrid  vllm servers with one ECExampleConnector folder (docs/vllm.md), the latter with --enable-mm-embeds
  --proxy FILE         disagg_epd_proxy.py; it is in the examples of vLLM's source distribution
  --python PYTHON      one that has vLLM's packages (default: python3)
  --write              put the tables into docs/benchmarks.md
`
const { values } = parseArgs({
  options: {
    encoder: { type: 'string' },
    hybrid: { type: 'string' },
    proxy: { type: 'string' },
    python: { type: 'string', default: 'python3' },
    rounds: { type: 'string', default: '20' },
    write: { type: 'boolean', default: false },
    help: { type: 'boolean', short: 'h', default: false }
  }
})
const { encoder, hybrid, proxy, python } = values
if (values.help || encoder === undefined || hybrid === undefined || proxy === undefined) {
  process.stderr.write(HELP)
  process.exit(values.help ? 0 : 2)
}
const rounds = Number(values.rounds)
/** Large enough that the gateway sends it to an encoder by default. */
const SIDE = 672
const FAILING = 20
const PATIENCE_MS = 60_000

/** In front of a server, so that it can go away for its clients and come back without a restart. */
class Door {
  readonly #target: URL
  readonly #sockets = new Set<Socket>()
  #server: Server | undefined
  #port = 0

  constructor (url: string) {
    this.#target = new URL(url)
  }

  get url (): string { return `http://127.0.0.1:${this.#port}` }

  async open (): Promise<this> {
    this.#server = createServer(client => {
      const server = connect({ host: this.#target.hostname, port: Number(this.#target.port), noDelay: true })
      client.setNoDelay(true)
      for (const [one, other] of [[client, server], [server, client]] as const) {
        this.#sockets.add(one)
        one.on('error', () => {}).on('close', () => { this.#sockets.delete(one); other.destroy() })
        one.pipe(other)
      }
    }).listen(this.#port, '127.0.0.1')
    await once(this.#server, 'listening')
    this.#port = (this.#server.address() as AddressInfo).port
    return this
  }

  async close (): Promise<void> {
    for (const socket of this.#sockets) socket.resetAndDestroy()
    this.#server!.close()
    await once(this.#server!, 'close')
  }
}

const children: ChildProcess[] = []
process.once('exit', () => { for (const child of children) child.kill('SIGKILL') })

async function started (command: string, args: readonly string[]): Promise<string> {
  const port = await freePort()
  const child = spawn(command, [...args, '--host', '127.0.0.1', '--port', String(port)], { stdio: 'ignore' })
  children.push(child)
  const url = `http://127.0.0.1:${port}`
  await until(async () => {
    if (child.exitCode !== null) throw new Error(`${command} ${args.join(' ')} ended with ${child.exitCode}`)
    return await fetch(`${url}/health`).then(answer => answer.ok, () => false)
  }, `${args[0]} answers /health`, PATIENCE_MS)
  return url
}

interface Way {
  readonly name: string
  send (body: object): Promise<Told>
}

/** What a proxy does at least: E, then PD with the same name for each picture. */
function byHand (e: string, pd: string): Way {
  let next = 0
  return {
    name: 'by hand',
    async send (body) {
      const { messages: [message], ...rest } = body as { messages: [{ content: Part[] }] }
      const run = `bench-${process.pid}-${next++}`
      const content = message.content.map((part, i) => part.type === 'text' ? part : { ...part, uuid: `${run}-${i}` })
      const pictures = content.filter(part => part.type !== 'text')
      if (pictures.length > 0) await ask(e, { model: 'tiny', messages: [{ role: 'user', content: pictures }] })
      return await ask(pd, { ...rest, messages: [{ role: 'user', content }] })
    }
  }
}

let seed = Date.now() % 1_000_000
const fresh = (): string => dataUrl(picture(seed++, SIDE, SIDE, 0))
const asking = (...urls: readonly string[]): object => chat([...urls.map(url => imagePart(url)), textPart('what is it')], { max_tokens: 4 })
const known = fresh()

const CASES: Readonly<Record<string, () => object>> = {
  text: () => asking(),
  'a new picture': () => asking(fresh()),
  'four new pictures': () => asking(fresh(), fresh(), fresh(), fresh()),
  'the same picture again': () => asking(known)
}

async function timed (way: Way, body: object): Promise<{ told: Told, ms: number }> {
  const start = performance.now()
  const told = await way.send(body).catch((error: Error): Told => ({ status: 0, error: { message: error.message }, plan: null, reason: null }))
  return { told, ms: performance.now() - start }
}

async function latencies (ways: readonly Way[]): Promise<string> {
  const rows: string[][] = []
  for (const [name, make] of Object.entries(CASES)) {
    const took = new Map(ways.map(way => [way, [] as number[]]))
    const failed = new Map(ways.map(way => [way, 0]))
    const plans = new Map<string, number>()
    for (let round = -2; round < rounds; round++) {
      for (let i = 0; i < ways.length; i++) {
        const way = ways[(i + round + 2) % ways.length]!
        const { told, ms } = await timed(way, make())
        if (told.tokens?.length !== 4) failed.set(way, failed.get(way)! + 1)
        if (round >= 0) took.get(way)!.push(ms)
        if (told.plan !== null) plans.set(told.plan, (plans.get(told.plan) ?? 0) + 1)
      }
    }
    const [base, ...others] = ways.map(way => median(took.get(way)!))
    rows.push([name, base!.toFixed(1), ...others.map(ms => `${ms.toFixed(1)} (${ms < base! ? '-' : '+'}${Math.abs(ms - base!).toFixed(1)})`), [...plans].map(([plan, count]) => `${count} x ${plan}`).join(', '), ways.map(way => failed.get(way)!).join(', ')])
    process.stderr.write(`${rows.at(-1)!.join('  ')}\n`)
  }
  return table(['ms', ...ways.map(way => way.name), 'plans of fastify-epd', 'failed, of each'], rows)
}

/** How often each kind of outcome came, and how long the middle one took. */
async function outcomes (way: Way): Promise<string> {
  const kinds = new Map<string, number>()
  const times: number[] = []
  for (let i = 0; i < FAILING; i++) {
    const { told, ms } = await timed(way, { ...asking(fresh()), stream: i % 2 === 1 })
    const kind = told.tokens?.length === 4 ? 'answered' : told.status === 200 || told.status === 0 ? '200, cut off' : `${told.status}`
    kinds.set(kind, (kinds.get(kind) ?? 0) + 1)
    times.push(ms)
  }
  return `${[...kinds].map(([kind, count]) => `${count} x ${kind}`).join(', ')}; ${median(times).toFixed(0)} ms`
}

const doors = { e: await new Door(encoder).open(), pd: await new Door(hybrid).open() }
const servers = ['--encode-servers-urls', doors.e.url, '--prefill-servers-urls', 'disable', '--decode-servers-urls', doors.pd.url]
const cli = fileURLToPath(new URL('../../plugin/cli/main.js', import.meta.url))
const leaving: Array<() => unknown> = []
const rewrite = await tempFile({ teardown: run => { leaving.push(run) } }, 'epd.config.json', JSON.stringify({ vllm: { handoff: 'rewrite' } }))
const gateways = await Promise.all([
  started(process.execPath, [cli, 'serve', '--log-level', 'error', ...servers]),
  started(process.execPath, [cli, 'serve', '--log-level', 'error', '--config', rewrite, ...servers]),
  started(python, [proxy, ...servers])
])
const [ours, oursRewriting, theirs] = ['fastify-epd', 'fastify-epd, rewrite', 'disagg_epd_proxy.py'].map((name, i): Way => ({ name, send: body => ask(gateways[i]!, body) })) as [Way, Way, Way]

const before = loadavg()[0]!
const fast = rounds === 0 ? '(not measured)' : await latencies([byHand(doors.e.url, doors.pd.url), ours, oursRewriting, theirs])
const failing: string[][] = []
for (const [name, door] of [['E is away', doors.e], ['PD is away', doors.pd]] as const) {
  await door.close()
  failing.push([name, await outcomes(ours), await outcomes(theirs)])
  await door.open()
  await until(async () => (await timed(ours, asking(fresh()))).told.tokens !== undefined, 'the gateway serves again', PATIENCE_MS)
  process.stderr.write(`${failing.at(-1)!.join('  ')}\n`)
}
const version = await fetch(`${hybrid}/version`).then(async answer => (await answer.json() as { version: string }).version)
const markdown = `## vLLM

Real vLLM ${version} servers on the CPU with a tiny Qwen2-VL of random weights, E and PD with the file connector, pictures of ${SIDE} x ${SIDE} and ${(picture(0, SIDE, SIDE, 0).length / 1e6).toFixed(1)} MB, 4 tokens, one request at a time, ${rounds} interleaved rounds, medians; in brackets what is added to the two calls by hand. The servers share the cores with what is measured, and the machine did other things: load average ${before.toFixed(0)} at the start, ${loadavg()[0]!.toFixed(0)} at the end. The proxy, and the gateway with \`vllm.handoff\` \`rewrite\`, send PD no pictures; by default the gateway does, and PD reads them once more.

${fast}

${FAILING} requests with a new picture, every other one streamed, while a server refuses connections:

${table(['', ours.name, theirs.name], failing)}

Measured on: ${machine()}`
console.log(markdown)
if (values.write) writeSection('vllm', markdown)
for (const door of Object.values(doors)) await door.close()
for (const leave of leaving) await leave()
process.exit(0)
