/**
 * Mixed load for a while: `npm run soak -- [--minutes 30] [--url http://gateway] [--model NAME]`. Without a URL it starts a gateway
 * and five engines of its own, kills one of the engines every 20 seconds, and starts it again. Ends with 1 unless all tables
 * are at rest at the end and resident memory is flat: within 10 % from a fifth of the time on.
 */
import { spawn, type ChildProcess } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { Agent, request } from 'undici'
import { freePort } from '../helper/free-port.ts'
import { seeded } from '../helper/random.ts'
import { drawScene } from '../helper/scenes.ts'
import { unrestOf } from '../helper/unrest.ts'

const MAIN = fileURLToPath(new URL('../../plugin/cli/main.js', import.meta.url))
const KILL_EVERY_MS = 20_000
const WORKERS = 6
const FLAT = 1.1

const { values } = parseArgs({ options: { minutes: { type: 'string', default: '30' }, url: { type: 'string' }, model: { type: 'string' }, seed: { type: 'string', default: '1' } } })
const durationMs = Number(values.minutes) * 60_000
const below = seeded(Number(values.seed))
const dispatcher = new Agent({ headersTimeout: 120_000, bodyTimeout: 120_000 })
const pause = (ms: number): Promise<void> => new Promise(resolve => { setTimeout(resolve, ms) })

const children = new Set<ChildProcess>()
process.once('exit', () => { for (const child of children) child.kill('SIGKILL') })
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => { process.exit(1) })

/** A process of ours, started again whenever it was killed. */
class Process {
  readonly name: string
  readonly #args: readonly string[]
  #child!: ChildProcess
  url = ''

  constructor (name: string, args: readonly string[]) {
    this.name = name
    this.#args = args
  }

  async start (): Promise<void> {
    this.#child = spawn(process.execPath, [MAIN, ...this.#args], { stdio: ['ignore', 'pipe', 'inherit'] })
    const child = this.#child
    children.add(child)
    child.once('exit', () => { children.delete(child) })
    const lines = createInterface({ input: this.#child.stdout! })
    const line = await new Promise<string>((resolve, reject) => {
      lines.on('line', text => { if (text.includes('http://')) resolve(text) })
      this.#child.once('exit', code => { reject(new Error(`${this.name} ended with ${code}`)) })
    })
    this.url = /http:\/\/[^\s/]+/.exec(line)![0]
  }

  async stop (signal: NodeJS.Signals): Promise<void> {
    const ended = new Promise(resolve => { this.#child.once('exit', resolve) })
    this.#child.kill(signal)
    await ended
  }

  /** Resident memory, MiB; NaN where the system does not say. */
  get memory (): number {
    try {
      return Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${this.#child.pid}/status`, 'utf8'))?.[1]) / 1024
    } catch { return NaN }
  }
}

async function text (url: string): Promise<string> {
  const { body } = await request(url, { dispatcher })
  return await body.text()
}

const counts = new Map<string, number>()
const count = (what: string): void => { counts.set(what, (counts.get(what) ?? 0) + 1) }

/** One request of some kind: short and long, text and pictures, whole and streamed, read to the end or left, now and then a bad one. */
async function ask (url: string, model: string, pictures: readonly string[]): Promise<void> {
  const kind = below(10)
  const content: object[] = [{ type: 'text', text: kind === 9 ? 'word '.repeat(3000 + below(3000)) : `Question ${below(20)}: how many shapes are there?` }]
  if (kind % 2 === 0) for (let i = 1 + below(2); i > 0; i--) content.unshift({ type: 'image_url', image_url: { url: pictures[below(pictures.length)] } })
  if (kind === 8) content.unshift({ type: 'image_url', image_url: { url: 'data:image/png;base64,AAAA' } })
  const stream = below(2) === 0
  const leaves = below(8) === 0
  const stop = new AbortController()
  const timer = leaves ? setTimeout(() => { stop.abort() }, below(400)) : undefined
  try {
    const { statusCode, body } = await request(url + '/v1/chat/completions', {
      dispatcher,
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model, messages: [{ role: 'user', content }], max_tokens: 1 + below(60), temperature: below(2), stream, n: 1 + below(2) }),
      signal: stop.signal
    })
    const answer = await body.text()
    count(`${statusCode}${answer.includes('"error":{') && statusCode === 200 ? ' broken off' : ''}`)
  } catch {
    count(leaves ? 'left' : 'no answer')
  } finally {
    clearTimeout(timer)
  }
}

/** What an engine still holds; undefined at rest. */
async function unrest (url: string): Promise<string | undefined> {
  return unrestOf(await text(url + '/metrics').catch((err: unknown) => String(err)))
}

async function main (): Promise<void> {
  const own: Process[] = []
  let folder: string | undefined
  let url = values.url?.replace(/\/+$/, '')
  if (url === undefined) {
    folder = await mkdtemp(join(tmpdir(), 'epd-soak-'))
    await writeFile(join(folder, 'epd.config.json'), JSON.stringify({ embedded: false, bypass: 'never' }))
    const gateway = new Process('gateway', ['serve', '--config', join(folder, 'epd.config.json'), '--port', '0', '--log-level', 'silent'])
    await gateway.start()
    url = gateway.url
    own.push(gateway)
    for (const [i, role] of ['encoder', 'encoder', 'hybrid', 'prefill', 'decode'].entries()) {
      const port = await freePort()
      const vision = role === 'hybrid' ? ['--no-vision'] : []
      const engine = new Process(`${role} ${i}`, ['engine', '--role', role, '--port', String(port), '--proxy-url', url, '--threads', '1', '--lease-seconds', '10', '--log-level', 'silent', ...vision])
      await engine.start()
      own.push(engine)
    }
    await pause(2_000)
  }
  const engines = own.slice(1)
  const models = JSON.parse(await text(url + '/v1/models')) as { data: Array<{ id: string }> }
  const model = values.model ?? models.data[0]?.id ?? ''
  const pictures = await Promise.all(Array.from({ length: 12 }, (_, i) => drawScene(i + 1)))
  const until = performance.now() + durationMs
  const workers = Array.from({ length: WORKERS }, async () => {
    while (performance.now() < until) await ask(url, model, pictures)
  })
  let kills = 0
  const killing = (async () => {
    while (engines.length > 0 && performance.now() + KILL_EVERY_MS < until) {
      await pause(KILL_EVERY_MS)
      // The gateway and the last encoder live through it all: their memory is what shows a leak.
      const victims = engines.filter((_, i) => i !== 1)
      const victim = victims[below(victims.length)]!
      await victim.stop(below(3) === 0 ? 'SIGTERM' : 'SIGKILL')
      await victim.start()
      kills++
    }
  })()
  const steady = own.filter(one => one === own[0] || one === engines[1])
  const memory: number[][] = []
  const watching = (async () => {
    for (let i = 0; performance.now() < until; i++) {
      await pause(Math.min(5_000, durationMs / 20))
      memory.push(steady.map(one => one.memory))
      if (i % 12 === 0) console.log(`${Math.round((until - performance.now()) / 1000)} s left, ${kills} kills, MiB: ${steady.map(one => `${one.name} ${one.memory.toFixed(0)}`).join(', ')}; ${[...counts].sort().map(([what, n]) => `${what}: ${n}`).join(', ')}`)
    }
  })()
  await Promise.all([...workers, killing, watching])

  const problems: string[] = []
  for (const engine of engines) {
    let held: string | undefined = 'unknown'
    for (let i = 0; i < 60 && held !== undefined; i++) {
      held = await unrest(engine.url)
      if (held !== undefined) await pause(500)
    }
    if (held !== undefined) problems.push(`${engine.name}: ${held}`)
  }
  const nodes = JSON.parse(await text(url + '/nodes/status').catch(() => '{}')) as Record<string, { unfinished?: number, vision_tokens?: number }>
  for (const [id, { unfinished = 0, vision_tokens: tokens = 0 }] of Object.entries(nodes)) if (unfinished + tokens > 0) problems.push(`gateway: ${id} has ${unfinished} unfinished, ${tokens} vision tokens`)
  // The median of a part, because collections come when they come.
  const median = (part: number[][], i: number): number => part.map(row => row[i] as number).sort((a, b) => a - b)[part.length >> 1] ?? NaN
  const fifth = Math.max(1, Math.floor(memory.length / 5))
  for (const [i, { name }] of steady.entries()) {
    const [from, to] = [median(memory.slice(fifth, 2 * fifth), i), median(memory.slice(-fifth), i)]
    console.log(`${name}: ${from.toFixed(0)} MiB after a fifth of the time, ${to.toFixed(0)} MiB at the end`)
    if (to > from * FLAT) problems.push(`${name} grew from ${from.toFixed(0)} to ${to.toFixed(0)} MiB`)
  }
  console.log(`${kills} kills; ${[...counts].sort().map(([what, n]) => `${what}: ${n}`).join(', ')}`)
  console.log(problems.length === 0 ? 'at rest, and flat' : problems.join('\n'))
  for (const one of own.reverse()) await one.stop('SIGTERM')
  if (folder !== undefined) await rm(folder, { recursive: true })
  process.exitCode = problems.length === 0 ? 0 : 1
}

await main()
