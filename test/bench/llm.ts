/** The LLM engine without HTTP: latency and speed by concurrency, and where the time outside onnxruntime goes. */
import { readdirSync, readFileSync } from 'node:fs'
import { ROOT_CONTEXT } from '@opentelemetry/api'
import type { ChatAnswer } from '../../engines/service/engine-service.ts'
import { createLlmEngine, type LlmRuntime, type LlmService } from '../../engines/llm/index.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'
import { median, quantile, table, type BenchContext } from './report.ts'

export const name = 'llm'

const CONCURRENCY = [1, 4, 16, 32]
/** Concurrency of the row that the budget of 15 % is for. */
const BUDGET_AT = 16
const OUTPUT_TOKENS = 128

interface Timed {
  /** Milliseconds to the first text, and to the end. */
  readonly first: number
  readonly total: number
}

interface Round {
  readonly calls: readonly Timed[]
  readonly tokensPerSecond: number
  readonly share: Share
}

/** CPU milliseconds of one round, by where they went. */
interface Share {
  readonly steps: number
  readonly ort: number
  readonly worker: number
  readonly main: number
  readonly other: number
  readonly compose: number
  readonly extend: number
  readonly sample: number
}

const log = { debug () {}, info () {}, warn () {}, error () {} }
let lastId = 0

async function call (engine: LlmService, words: number): Promise<Timed> {
  const start = performance.now()
  const content = `Question ${++lastId}. ` + 'What do you think of this? '.repeat(words)
  const answer = await engine.chat({
    body: { messages: [{ role: 'user', content }], max_tokens: OUTPUT_TOKENS, ignore_eos: true, temperature: 0, stream: true },
    signal: new AbortController().signal,
    requestId: `bench-${lastId}`,
    context: ROOT_CONTEXT
  }) as Extract<ChatAnswer, { stream: unknown }>
  let first = 0
  for await (const bytes of answer.stream) if (first === 0 && bytes.length > 0) first = performance.now() - start
  return { first, total: performance.now() - start }
}

/** CPU time of each thread, milliseconds; empty where there is no /proc. */
function threads (): Map<string, number> {
  const times = new Map<string, number>()
  try {
    for (const id of readdirSync('/proc/self/task')) times.set(id, Number(readFileSync(`/proc/self/task/${id}/schedstat`, 'utf8').split(' ')[0]) / 1e6)
  } catch {
    times.clear()
  }
  return times
}

async function measureShare (runtime: LlmRuntime, run: () => Promise<void>): Promise<Share> {
  const before = { totals: { ...runtime.runner.totals }, timings: await runtime.runner.timings(), threads: threads(), steps: runtime.engine.steps.decode }
  await run()
  const after = { totals: runtime.runner.totals, timings: await runtime.runner.timings(), threads: threads() }
  const spent = [...after.threads].map(([id, ms]) => ({ id, ms: ms - (before.threads.get(id) ?? 0) })).sort((a, b) => b.ms - a.ms)
  const main = spent.find(thread => thread.id === String(process.pid))?.ms ?? NaN
  // With one thread a session, the busiest thread beside the main one is the session worker.
  const worker = spent.find(thread => thread.id !== String(process.pid))?.ms ?? NaN
  const ortShare = (after.totals.ortUs - before.totals.ortUs) / (after.totals.busyUs - before.totals.busyUs)
  return {
    steps: runtime.engine.steps.decode - before.steps,
    ort: worker * ortShare,
    worker: worker * (1 - ortShare),
    main,
    other: spent.reduce((sum, thread) => sum + thread.ms, 0) - main - worker,
    compose: after.timings.compose - before.timings.compose,
    extend: after.timings.extend - before.timings.extend,
    sample: after.timings.sample - before.timings.sample
  }
}

async function round (engine: LlmService, runtime: LlmRuntime, concurrency: number, perClient: number): Promise<Round> {
  const calls: Timed[] = []
  const start = performance.now()
  const share = await measureShare(runtime, async () => {
    await Promise.all(Array.from({ length: concurrency }, async (_, client) => {
      for (let i = 0; i < perClient; i++) calls.push(await call(engine, 4 + (client + i) % 6))
    }))
  })
  return { calls, tokensPerSecond: calls.length * OUTPUT_TOKENS / (performance.now() - start) * 1000, share }
}

function outside ({ ort, worker, main, other }: Share): number {
  return (worker + main + other) / (ort + worker + main + other)
}

function shareRows (share: Share): Array<[string, number, string]> {
  const { ort, worker, main, other, compose, extend, sample, steps } = share
  const total = ort + worker + main + other
  const row = (label: string, ms: number): [string, number, string] => [label, ms / steps * 1000, `${(ms / total * 100).toFixed(1)} %`]
  return [
    row('onnxruntime (embed_tokens, decoder)', ort),
    row('session worker: rows joining and leaving the batch, laying out the past', compose),
    row('session worker: new keys and values to past and paged blocks', extend),
    row('session worker: sampling', sample),
    row('session worker: tensors, messages', Math.max(0, worker - compose - extend - sample)),
    row('main thread: scheduling, detokenising, SSE, messages', main),
    row('other threads: garbage collection, compilation', other)
  ]
}

export async function run (context: BenchContext): Promise<string> {
  const engine = await createLlmEngine({
    engineId: 'http://bench',
    role: 'hybrid',
    backend: 'pytorch',
    modelDir: tinyModelDir,
    host: '127.0.0.1',
    device: 'cpu',
    threads: 1,
    vision: false,
    media: { allowPrivate: false, allowedDomains: [] },
    log
  }, { prefixCaching: false })
  try {
    await engine.ready
    const runtime = engine.runtime as LlmRuntime
    for (let i = 0; i < 2; i++) await round(engine, runtime, BUDGET_AT, 2)
    const rows: Array<Array<string | number>> = []
    let breakdown: Share | undefined
    for (const concurrency of CONCURRENCY) {
      const rounds: Round[] = []
      for (let i = 0; i < context.rounds; i++) rounds.push(await round(engine, runtime, concurrency, context.quick ? 2 : 4))
      const first = rounds.flatMap(({ calls }) => calls.map(one => one.first))
      const perToken = rounds.flatMap(({ calls }) => calls.map(one => (one.total - one.first) / (OUTPUT_TOKENS - 1)))
      rows.push([concurrency, quantile(first, 0.5), quantile(first, 0.99), median(perToken), median(rounds.map(one => one.tokensPerSecond)), `${(median(rounds.map(one => outside(one.share))) * 100).toFixed(1)} %`])
      if (concurrency === BUDGET_AT) breakdown = rounds[Math.floor(rounds.length / 2)]?.share
      context.log(`  ${concurrency} concurrent`)
    }
    return [
      '## Language model engine',
      `Prompts of about 40 to 90 tokens, ${OUTPUT_TOKENS} tokens of output, closed loop, one session thread, no HTTP.`,
      table(['concurrent', 'TTFT p50, ms', 'TTFT p99, ms', 'per token p50, ms', 'tokens/s', 'CPU outside onnxruntime'], rows),
      `CPU time per decode step at ${BUDGET_AT} concurrent (budget: 15 % outside onnxruntime):`,
      table(['part', 'µs', 'share'], breakdown === undefined ? [] : shareRows(breakdown))
    ].join('\n\n')
  } finally {
    await engine.close()
  }
}
