/**
 * Requests while nodes fail: `npm run chaos -- [REQUESTS] [SEED]`, by default 1,000. Three encoders, two language models (PD), a
 * prefill (P) and a decode node (D), all without vision weights but the encoders, are killed, stopped, reset and made to answer
 * garbage; one encoder and one PD are well at any time. Ends with 1 unless {@link ChaosReport.problems} is empty.
 */
import { readFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'
import type { Ending } from '../helper/cli.ts'
import { seeded } from '../helper/random.ts'
import { drawScene } from '../helper/scenes.ts'
import { SPOIL, SPOIL_RESULT } from './garbage.ts'
import type { Response } from 'undici'
import { Engine, GatewayProcess, openFiles, settle, until, type Question } from './house.ts'

const WORKERS = 6
const RIGHT_AT_LEAST = 0.99
/** Sockets that pools keep open for the next request. */
const KEPT_FILES = 6
const TIMEOUTS = { encode: 4_000, prefill: 4_000, firstByte: 6_000, answer: 8_000, idle: 10_000 }
const FAULTS = ['kill', 'stop', 'reset', 'garbage'] as const

export interface ChaosReport {
  /** Requests by what became of them. */
  readonly outcomes: Readonly<Record<string, number>>
  /** Times that each fault befell a node of a role. */
  readonly faults: Readonly<Record<string, number>>
  /** Each request that was not answered right, with the plan and the nodes that were ill meanwhile. */
  readonly errors: readonly string[]
  /** What breaks the promises: a wrong answer, an unclear error, too many errors, something that is still held. */
  readonly problems: readonly string[]
}

const pause = async (ms: number): Promise<void> => { await new Promise(resolve => { setTimeout(resolve, ms) }) }
const add = (counts: Record<string, number>, name: string): void => { counts[name] = (counts[name] ?? 0) + 1 }

/** Short and long, text and pictures; a long one is prefilled by P and decoded by D. */
async function makeQuestions (): Promise<Question[]> {
  const pictures = await Promise.all(Array.from({ length: 12 }, (_, i) => drawScene(i + 1)))
  return Array.from({ length: 24 }, (_, i) => {
    const parts = pictures.slice(i % 12, i % 12 + i % 3).map(url => ({ type: 'image_url', image_url: { url } }))
    const text = `${i % 4 === 3 ? 'word '.repeat(300) : ''}Question ${i}: how many shapes are there?`
    return { more: { messages: [{ role: 'user', content: [...parts, { type: 'text', text }] }] } }
  })
}

interface Outcome {
  readonly name: string
  readonly text?: string
  /** A promise to clients that it breaks. */
  readonly broken?: true
  readonly plan: string | null
  readonly traceId?: string | null
}

/** What an error says; undefined when it is unclear. */
function errorOf (body: any): string | undefined {
  const { message, type, code } = body?.error ?? {}
  return typeof message === 'string' && typeof type === 'string' && typeof code === 'string' ? code : undefined
}

/** Asks once, as a client that does not try again. */
async function ask (gateway: GatewayProcess, question: Question, streamed: boolean): Promise<Outcome> {
  const seen = (headers: Response['headers']): Pick<Outcome, 'plan' | 'traceId'> => ({ plan: headers.get('x-epd-plan'), traceId: headers.get('x-epd-trace-id') })
  const failed = (seen: Pick<Outcome, 'plan' | 'traceId'>, where: string, body: unknown): Outcome => {
    const code = errorOf(body)
    return code === undefined || where === '500' ? { name: `${where} ${JSON.stringify(body)?.slice(0, 200)}`, broken: true, ...seen } : { name: `${where} ${code}`, ...seen }
  }
  try {
    if (!streamed) {
      const { status, headers, body } = await gateway.ask(question)
      const of = seen(headers)
      if (status !== 200) return failed(of, String(status), body)
      const text: unknown = body?.choices?.[0]?.message?.content
      return typeof text === 'string' ? { name: 'answered', text, ...of } : { name: `200 that is no answer: ${JSON.stringify(body).slice(0, 200)}`, broken: true, ...of }
    }
    const stream = await gateway.stream(question)
    const of = seen(stream.headers)
    const whole = await stream.ended
    if (stream.status !== 200) return failed(of, String(stream.status), stream.body)
    if (!whole) return { name: 'stream that breaks off', broken: true, ...of }
    if (stream.last !== '[DONE]') return failed(of, 'error event', stream.last)
    return { name: 'answered', text: stream.events.map(event => event.choices?.[0]?.delta?.content ?? '').join(''), ...of }
  } catch (err) {
    return { name: `no answer: ${String(err)}`, broken: true, plan: null }
  }
}

/** Makes nodes ill and well again until it is told to stop. */
class Storm {
  readonly faults: Record<string, number> = {}
  readonly #engines: readonly Engine[]
  readonly #gateway: GatewayProcess
  readonly #below: (below: number) => number
  readonly #ill = new Map<Engine, string>()
  readonly #all = new Set<Promise<void>>()
  #over = false

  constructor (gateway: GatewayProcess, engines: readonly Engine[], below: (below: number) => number) {
    this.#gateway = gateway
    this.#engines = engines
    this.#below = below
  }

  /** The nodes that are ill at the moment, by role and place. */
  get ill (): string {
    return [...this.#ill].map(([engine, fault]) => `${fault} ${engine.role} ${this.#engines.indexOf(engine)}`).join(', ')
  }

  async blow (): Promise<void> {
    while (!this.#over) {
      const victim = this.#engines[this.#below(this.#engines.length)]!
      const others = this.#engines.filter(one => one !== victim && one.role === victim.role && !this.#ill.has(one))
      // P and D have no second one: PD stands in for both.
      const spared = this.#ill.has(victim) || (others.length === 0 && ['encoder', 'hybrid'].includes(victim.role))
      if (!spared) {
        const fault = FAULTS[this.#below(FAULTS.length)]!
        add(this.faults, `${fault} ${victim.role}`)
        this.#ill.set(victim, fault)
        const illness = this.#befall(victim, fault).finally(() => { this.#ill.delete(victim); this.#all.delete(illness) })
        this.#all.add(illness)
      }
      await pause(200 + this.#below(1_000))
    }
    await Promise.all(this.#all)
  }

  end (): void {
    this.#over = true
  }

  async #befall (victim: Engine, fault: typeof FAULTS[number]): Promise<void> {
    if (fault === 'stop') {
      victim.freeze(true)
      await pause(500 + this.#below(6_000))
      victim.freeze(false)
    } else if (fault === 'kill') {
      await victim.stop('SIGKILL')
      await pause(this.#below(1_000))
      await victim.startAgain()
    } else {
      const kinds = Object.values(victim.role === 'encoder' ? { ...SPOIL, ...SPOIL_RESULT } : SPOIL)
      victim.node.fail(fault === 'reset' ? { kind: 'reset' } : { kind: 'garbage', choose: () => this.#below(3) === 0 ? kinds[this.#below(kinds.length)] : undefined })
      await pause(500 + this.#below(fault === 'reset' ? 1_500 : 4_000))
      victim.node.heal()
    }
    const well = this.#engines.filter(one => one === victim || !this.#ill.has(one))
    // Others may have fallen ill in the meantime.
    await this.#gateway.linked(...well).catch(() => {})
  }
}

/** What a request met, a line for each stage: its attempts. */
async function stagesOf (gateway: GatewayProcess, traceId: string, engines: readonly Engine[]): Promise<string[]> {
  const spans = await gateway.stages(traceId)
  return spans.map(({ name, attributes, offsetMs, durationMs, status }) => {
    const at = engines.findIndex(({ id }) => id === attributes['epd.node'])
    const node = at === -1 ? '' : ` ${engines[at]!.role} ${at}`
    return `    ${Math.round(offsetMs)} + ${Math.round(durationMs)} ms ${name}${node} ${String(attributes['error.type'] ?? '')} ${status.message ?? String(attributes['epd.reason'] ?? '')}`.trimEnd()
  })
}

/** Child processes of a process, where the system reports them. */
function childrenOf (pid: number): string {
  try { return readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim() } catch { return '' }
}

export async function chaos (t: Ending, { requests, seed }: { requests: number, seed: number }): Promise<ChaosReport> {
  const below = seeded(seed)
  const gateway = await GatewayProcess.start(t, { timeouts: TIMEOUTS, routing: { disaggregateTokens: 300 } })
  const roles = ['encoder', 'encoder', 'encoder', 'hybrid', 'hybrid', 'prefill', 'decode'] as const
  const engines = await Promise.all(roles.map(async role => await Engine.start(t, role, { flags: ['--lease-seconds', '5', ...['hybrid', 'prefill'].includes(role) ? ['--no-vision'] : []] })))
  await gateway.use(...engines)
  const questions = await makeQuestions()
  const outcomes: Record<string, number> = {}
  const [errors, problems]: [string[], string[]] = [[], []]

  const right: string[] = []
  for (const question of questions) {
    const { name, text } = await ask(gateway, question, false)
    if (text === undefined) throw new Error(`no fault yet, but ${name}`)
    right.push(text)
  }
  await settle(gateway, ...engines)
  const parts = [gateway, ...engines]
  const filesBefore = parts.map(part => openFiles(part.pid))

  const storm = new Storm(gateway, engines, below)
  const blowing = storm.blow()
  let asked = 0
  await Promise.all(Array.from({ length: WORKERS }, async () => {
    while (asked < requests) {
      const number = asked++
      const i = below(questions.length)
      const streamed = below(2) === 0
      const before = storm.ill
      const since = performance.now()
      const outcome = await ask(gateway, questions[i]!, streamed)
      const name = outcome.text === undefined ? outcome.name : outcome.text === right[i] ? 'right' : 'wrong answer'
      add(outcomes, name)
      if (name === 'right') continue
      const line = `${number}, question ${i}${streamed ? ', streamed' : ''}: ${name} after ${Math.round(performance.now() - since)} ms by ${outcome.plan}; ill: ${before} -> ${storm.ill}`
      errors.push([line, ...outcome.traceId == null ? [] : await stagesOf(gateway, outcome.traceId, engines)].join('\n'))
      if (outcome.broken === true || name === 'wrong answer') problems.push(line)
    }
  }))
  storm.end()
  await blowing

  if ((outcomes.right ?? 0) < requests * RIGHT_AT_LEAST) problems.push(`${outcomes.right} of ${requests} were answered right`)
  await gateway.linked(...engines).catch((err: unknown) => { problems.push(String(err)) })
  problems.push(...await settle(...parts))
  for (const remains of await Promise.all(engines.map(async engine => await engine.remains()))) if (remains !== undefined) problems.push(remains)
  const running = await gateway.runningTraces()
  if (running > 0) problems.push(`${running} traces have not ended`)
  for (const [i, part] of parts.entries()) {
    const name = part instanceof Engine ? `${part.role} ${i - 1}` : 'gateway'
    const before = filesBefore[i]
    if (before !== undefined) await until(() => openFiles(part.pid)! <= before + KEPT_FILES, 'files are closed').catch(() => { problems.push(`${name} has ${openFiles(part.pid)} files open, had ${before}`) })
    if (childrenOf(part.pid) !== '') problems.push(`${name} has child processes: ${childrenOf(part.pid)}`)
  }
  for (const [i, code] of (await Promise.all([...engines, gateway.server].map(async part => await part.stop('SIGTERM')))).entries()) if (code !== 0) problems.push(`${roles[i] ?? 'gateway'} ended with ${code}`)
  return { outcomes, faults: storm.faults, errors, problems }
}

function table (title: string, counts: Readonly<Record<string, number>>): string {
  return [title, ...Object.entries(counts).sort(([, a], [, b]) => b - a).map(([name, n]) => `${String(n).padStart(6)}  ${name}`)].join('\n')
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [requests = 1_000, seed = Date.now() % 1e6] = process.argv.slice(2).map(Number)
  if (!Number.isSafeInteger(requests) || requests < 1 || !Number.isSafeInteger(seed)) throw new Error('npm run chaos -- [REQUESTS] [SEED]: two whole numbers')
  console.log(`${requests} requests, seed ${seed}`)
  const ends: Array<() => unknown> = []
  const since = performance.now()
  try {
    const { outcomes, faults, errors, problems } = await chaos({ teardown: end => ends.unshift(end) }, { requests, seed })
    console.log([table('faults', faults), table('outcomes', outcomes), ...errors].join('\n'))
    console.log(problems.length === 0 ? 'kept all bounds; at rest: leases, blocks, sequences, requests, traces, files, processes' : `broken:\n${problems.join('\n')}`)
    console.log(`${((performance.now() - since) / 1000).toFixed(0)} s`)
    process.exitCode = problems.length === 0 ? 0 : 1
  } finally {
    for (const end of ends) await end()
  }
}
