import { headerValue, oneOf, httpUrl, parseFlags, timeOf, UsageError, whole, withUsage } from '../usage.ts'
import { jsonText, ProgressLine } from '../terminal.ts'
import { runLoad, type LoadOptions, type LoadProgress } from './load.ts'
import { renderReport } from './summary.ts'

const HELP = `fastify-epd bench: a load of pictures and text for any OpenAI-compatible server, and what it takes

Usage: fastify-epd bench URL [options]

URL is the server's base URL, with or without /v1 at its end. Answers are streamed.

Load:
  --requests N         how many (default: 100, unless --duration is given)
  --duration TIME      send requests for so long, such as 30s or 2m
  --concurrency N      a closed loop with N requests in flight (default: 8); with --rate the most in flight
  --rate R             an open loop: R requests a second at random times (Poisson), however fast answers come
  --warmup N           requests before those that count (default: 0)

Requests:
  --model NAME         default: the first of /v1/models
  --pictures N         pictures of a request (default: 1); fresh ones, unless --repeat says otherwise
  --size WxH           pixels of a picture; one number is both (default: 448)
  --format png|jpeg    default: png; jpeg needs the package sharp
  --repeat SHARE       0 to 1: how many of the pictures were sent before (default: 0)
  --text-share SHARE   0 to 1: how many of the requests have text only (default: 0)
  --prompt-tokens N    roughly (default: 32)
  --max-tokens N       of an answer (default: 64)
  --ignore-eos         answers of --max-tokens, where the server knows ignore_eos (vLLM, SGLang, LMDeploy)
  --no-usage           do not ask for usage in the stream; tokens are counted by chunks
  --body JSON          further members of each body, such as '{"temperature":0}'
  --key KEY            sent as bearer token (or environment EPD_API_KEY)
  --header 'NAME: VALUE'  sent with each request; may be repeated
  --timeout TIME       of one request (default: 5m)
  --seed N             another seed gives other pictures, texts and times (default: 1)

Objective:
  --slo-ttft TIME      goodput counts requests with their first token within this, such as 2s
  --slo-tpot TIME      and their time per output token within this, such as 50ms

Output:
  --json               the whole result, each request included, as JSON
  -h, --help           this text

Ctrl-C ends the load and prints what there is. Exit code 1: no request was answered well.
`

const FLAGS = {
  requests: { type: 'string' },
  duration: { type: 'string' },
  concurrency: { type: 'string' },
  rate: { type: 'string' },
  warmup: { type: 'string' },
  model: { type: 'string' },
  pictures: { type: 'string' },
  size: { type: 'string' },
  format: { type: 'string', default: 'png' },
  repeat: { type: 'string' },
  'text-share': { type: 'string' },
  'prompt-tokens': { type: 'string' },
  'max-tokens': { type: 'string' },
  'ignore-eos': { type: 'boolean', default: false },
  'no-usage': { type: 'boolean', default: false },
  body: { type: 'string' },
  key: { type: 'string' },
  header: { type: 'string', multiple: true },
  timeout: { type: 'string' },
  seed: { type: 'string' },
  'slo-ttft': { type: 'string' },
  'slo-tpot': { type: 'string' },
  json: { type: 'boolean', default: false },
  help: { type: 'boolean', short: 'h', default: false }
} as const

const MAX_COUNT = 10_000_000
const MAX_CONCURRENCY = 10_000
const MAX_RATE = 100_000
const MAX_PICTURES = 64
const MAX_EDGE = 8_192
const MAX_TOKENS = 1_000_000
/** Of a request's pictures together; they are made in memory. */
const MAX_PIXELS = 128 * 2 ** 20

/** `fastify-epd bench`. */
export function benchCommand (argv: string[]): Promise<number> {
  return withUsage('bench', async () => {
    const flags = benchOptions(argv)
    if (flags === undefined) {
      process.stdout.write(HELP)
      return 0
    }
    return await run(flags.options, flags.json)
  })
}

async function run (options: LoadOptions, json: boolean): Promise<number> {
  const stop = new AbortController()
  const onSignal = (): void => { stop.abort() }
  process.once('SIGINT', onSignal).once('SIGTERM', onSignal)
  const line = new ProgressLine()
  try {
    const report = await runLoad({ ...options, signal: stop.signal, onProgress: progress => { line.update(progressOf(progress, options)) } })
    line.clear()
    process.stdout.write(json ? jsonText(report, 2) : renderReport(report))
    return report.requests > 0 ? 0 : 1
  } finally {
    line.clear()
    process.off('SIGINT', onSignal).off('SIGTERM', onSignal)
  }
}

function progressOf ({ phase, elapsedMs, inFlight, done, failed }: LoadProgress, { requests, durationMs, warmup }: LoadOptions): string {
  if (phase === 'prepare') return 'making the first pictures'
  const seconds = elapsedMs / 1_000
  const total = phase === 'warm-up' ? warmup : requests ?? (durationMs === undefined ? 100 : undefined)
  const time = durationMs === undefined || phase === 'warm-up' ? `${seconds.toFixed(0)} s` : `${seconds.toFixed(0)} of ${durationMs / 1_000} s`
  return `${phase}: ${done}${total === undefined ? '' : ` of ${total}`} answered, ${inFlight} in flight, ${failed} failed, ${(done / Math.max(seconds, 0.001)).toFixed(1)}/s, ${time}`
}

/** What the flags ask for; undefined for help. Throws UsageError. */
export function benchOptions (argv: string[]): { readonly options: LoadOptions, readonly json: boolean } | undefined {
  const { values, positionals } = parseFlags({ args: argv, options: FLAGS, allowPositionals: true })
  return values.help ? undefined : { options: optionsOf(values, positionals), json: values.json }
}

type Values = ReturnType<typeof parseFlags<{ options: typeof FLAGS, args: string[] }>>['values']

function optionsOf (values: Values, positionals: readonly string[]): LoadOptions {
  if (positionals.length !== 1) throw new UsageError(positionals.length === 0 ? 'give the URL of a server, such as http://127.0.0.1:8000' : `give one URL, not also '${positionals[1]}'`)
  const key = values.key ?? process.env.EPD_API_KEY
  const size = values.size === undefined ? undefined : sizeOf(values.size)
  const url = httpUrl('URL', positionals[0]!)
  if (new URL(url).username + new URL(url).password !== '') throw new UsageError('URL must not hold a password: --key or --header sends one')
  const pictures = whole('--pictures', values.pictures, 0, MAX_PICTURES)
  const [width, height] = size ?? []
  if ((pictures ?? 1) * (width ?? 1) * (height ?? 1) > MAX_PIXELS) throw new UsageError(`--pictures and --size ask for more than ${MAX_PIXELS / 2 ** 20} megapixels a request`)
  return {
    url,
    model: values.model,
    requests: whole('--requests', values.requests, 1, MAX_COUNT),
    durationMs: timeOf('--duration', values.duration),
    concurrency: whole('--concurrency', values.concurrency, 1, MAX_CONCURRENCY),
    rate: rateOf(values.rate),
    warmup: whole('--warmup', values.warmup, 0, MAX_COUNT),
    pictures,
    width,
    height,
    format: oneOf('--format', values.format, ['png', 'jpeg'] as const),
    repeat: shareOf('--repeat', values.repeat),
    textShare: shareOf('--text-share', values['text-share']),
    promptTokens: whole('--prompt-tokens', values['prompt-tokens'], 1, MAX_TOKENS),
    maxTokens: whole('--max-tokens', values['max-tokens'], 1, MAX_TOKENS),
    ignoreEos: values['ignore-eos'],
    usage: !values['no-usage'],
    body: values.body === undefined ? undefined : objectOf(values.body),
    headers: { ...(key === undefined ? {} : headerOf('--key', 'authorization', `Bearer ${key}`)), ...Object.assign({}, ...(values.header ?? []).map(headerLine)) },
    seed: whole('--seed', values.seed, 0, 0xffffffff),
    timeoutMs: timeOf('--timeout', values.timeout),
    sloTtftMs: timeOf('--slo-ttft', values['slo-ttft']),
    sloTpotMs: timeOf('--slo-tpot', values['slo-tpot'])
  }
}

function rateOf (text: string | undefined): number | undefined {
  if (text === undefined) return undefined
  const rate = Number(text)
  if (!/^\d+(\.\d+)?$/.test(text) || rate <= 0 || rate > MAX_RATE) throw new UsageError(`--rate must be requests per second, above 0 and up to ${MAX_RATE}, not '${text}'`)
  return rate
}

function shareOf (flag: string, text: string | undefined): number | undefined {
  if (text === undefined) return undefined
  const share = Number(text)
  if (!/^(\d+(\.\d+)?|\.\d+)$/.test(text) || share > 1) throw new UsageError(`${flag} must be a share from 0 to 1, not '${text}'`)
  return share
}

function sizeOf (text: string): [number, number] {
  const [, width, height = width] = /^(\d+)(?:x(\d+))?$/i.exec(text) ?? []
  const size = [Number(width), Number(height)] as [number, number]
  if (!size.every(edge => edge >= 1 && edge <= MAX_EDGE)) throw new UsageError(`--size must be WxH in pixels, such as 640x480, up to ${MAX_EDGE} each, not '${text}'`)
  return size
}

function objectOf (text: string): Record<string, unknown> {
  const value: unknown = (() => { try { return JSON.parse(text) } catch { return undefined } })()
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw new UsageError(`--body must be a JSON object, not '${text}'`)
  if ('stream' in value && value.stream !== true) throw new UsageError('--body must not turn streaming off: first tokens and times per token are measured in streams')
  return value as Record<string, unknown>
}

function headerLine (line: string): Record<string, string> {
  const colon = line.indexOf(':')
  if (colon < 1) throw new UsageError(`--header must be 'NAME: VALUE', not '${line}'`)
  return headerOf('--header', line.slice(0, colon).trim().toLowerCase(), line.slice(colon + 1).trim())
}

function headerOf (flag: string, name: string, value: string): Record<string, string> {
  if (!/^[\w!#$%&'*+.^`|~-]+$/.test(name)) throw new UsageError(`${flag} has characters that a header can't have`)
  return { [name]: headerValue(flag, value) }
}
