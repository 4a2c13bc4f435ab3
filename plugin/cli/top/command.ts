import { setTimeout as delay } from 'node:timers/promises'
import { addressOf, ask, GATEWAY_FLAGS, GATEWAY_HELP, UnreachableError, type GatewayAddress } from '../gateway-client.ts'
import { breakersOf, nodesOf, type NodeRow } from '../node-status.ts'
import { clean, duration, jsonText, Screen, table } from '../terminal.ts'
import { parseFlags, timeOf, UsageError, whole, withUsage } from '../usage.ts'
import { ratesBetween, samplesOf, type Percentiles, type Rates, type Reading } from './readings.ts'

const HELP = `fastify-epd top: nodes and rates of a running gateway, live

Usage: fastify-epd top [options]

On a terminal the picture is drawn again at each interval, until Ctrl-C. In a pipe it is printed once.

Options:
${GATEWAY_HELP}  --interval TIME    rates are over this time (default: 2s)
  --count N          so many pictures, then the end (default: no end on a terminal, 1 in a pipe)
  --json             each picture as a line of JSON
  -h, --help         this text
`

const FLAGS = {
  ...GATEWAY_FLAGS,
  interval: { type: 'string', default: '2s' },
  count: { type: 'string' },
  json: { type: 'boolean', default: false },
  help: { type: 'boolean', short: 'h', default: false }
} as const

const MIN_INTERVAL_MS = 100
const MAX_COUNT = 1_000_000

/** `fastify-epd top`. */
export function topCommand (argv: string[]): Promise<number> {
  return withUsage('top', async () => {
    const { values } = parseFlags({ args: argv, options: FLAGS })
    if (values.help) {
      process.stdout.write(HELP)
      return 0
    }
    const interval = timeOf('--interval', values.interval)!
    if (interval < MIN_INTERVAL_MS) throw new UsageError(`--interval must be ${MIN_INTERVAL_MS}ms or more, not '${values.interval}'`)
    const live = process.stdout.isTTY === true && !values.json
    const count = whole('--count', values.count, 1, MAX_COUNT) ?? (live ? Infinity : 1)
    await watch(addressOf(values), { interval, count, live, json: values.json })
    return 0
  })
}

interface WatchOptions { readonly interval: number, readonly count: number, readonly live: boolean, readonly json: boolean }

async function watch (gateway: GatewayAddress, { interval, count, live, json }: WatchOptions): Promise<void> {
  let earlier = await readingOf(gateway)
  const stop = new AbortController()
  const onSignal = (): void => { stop.abort() }
  process.once('SIGINT', onSignal).once('SIGTERM', onSignal)
  // The reader of the pipe has seen enough.
  process.stdout.once('error', onSignal)
  const screen = live ? new Screen(process.stdout) : undefined
  try {
    // A terminal has something at once.
    screen?.show(render(gateway, earlier, undefined))
    for (let n = 0; n < count; n++) {
      await delay(interval, undefined, { signal: stop.signal }).catch(() => {})
      if (stop.signal.aborted) return
      try {
        const later = await readingOf(gateway)
        const rates = ratesBetween(earlier, later)
        earlier = later
        if (screen !== undefined) screen.show(render(gateway, later, rates))
        else if (json) process.stdout.write(jsonText({ time: new Date().toISOString(), ...rates, nodes: later.nodes.map(({ links: _links, latency: _latency, ...node }) => ({ ...node, ...rates.nodes[node.url] })) }))
        else process.stdout.write((n === 0 ? '' : '\n') + render(gateway, later, rates))
      } catch (err) {
        if (screen === undefined || !(err instanceof UnreachableError)) throw err
        screen.show(`${clean(err.message)}; waiting for it\n\n${render(gateway, earlier, undefined)}`)
      }
    }
  } finally {
    screen?.close()
    process.off('SIGINT', onSignal).off('SIGTERM', onSignal)
    process.stdout.off('error', onSignal)
  }
}

async function readingOf (gateway: GatewayAddress): Promise<Reading> {
  const [nodes, metrics] = await Promise.all([nodesOf(gateway), ask(gateway, '/metrics')])
  // A gateway may have no metrics of its own: then there are nodes without rates.
  return { at: performance.now(), nodes, samples: metrics.status === 200 ? samplesOf(metrics.text) : [] }
}

function render ({ url }: GatewayAddress, { nodes, samples }: Reading, rates: Rates | undefined): string {
  const healthy = nodes.filter(({ health }) => health === 'healthy').length
  const time = new Date().toTimeString().slice(0, 8)
  const head = `${clean(url)}   ${time}   ${healthy} of ${nodes.length} nodes healthy\n`
  const totals = samples.length === 0 ? 'no rates: the gateway gives no /metrics (option routes.metrics)\n' : rates === undefined ? '\n' : totalsOf(rates)
  return `${head}${totals}\n${table([
    ['NODE', 'ROLE', 'HEALTH', 'IN FLIGHT', 'TOKENS', 'CALLS/S', 'FAILED/S', 'MEAN'],
    // Those that need a look come first.
    ...[...nodes].sort((a, b) => Number(a.health === 'healthy') - Number(b.health === 'healthy')).map(node => {
      const own = rates?.nodes[node.url]
      return [
        node.url, node.role, stateOf(node), String(node.unfinished), String(node.vision_tokens),
        rateOf(own?.callsPerSecond), rateOf(own?.failuresPerSecond), typeof own?.meanMs === 'number' ? duration(own.meanMs) : '-'
      ]
    })
  ])}`
}

function totalsOf ({ requests, inFlight, waiting, retriesPerSecond, outputTokensPerSecond, ttftMs, tpotMs, seconds }: Rates): string {
  return table([
    ['requests/s', `${rateOf(requests.ok)} ok, ${rateOf(requests.error)} failed, ${rateOf(requests.refused)} refused, ${rateOf(requests.aborted)} left; ${rateOf(retriesPerSecond)} retries; ${inFlight} in flight, ${waiting} waiting`],
    ['output', `${outputTokensPerSecond.toFixed(1)} tokens/s, as answers with usage say`],
    ['TTFT', `${percentilesOf(ttftMs)}`],
    ['TPOT', `${percentilesOf(tpotMs)}   (over ${seconds.toFixed(1)} s)`]
  ])
}

/** With the breakers that are not closed. */
function stateOf (node: NodeRow): string {
  const breakers = breakersOf(node)
  return breakers === 'closed' ? node.health : `${node.health}, ${breakers}`
}

function rateOf (perSecond: number | undefined): string {
  return perSecond === undefined ? '-' : perSecond.toFixed(1)
}

function percentilesOf (spread: Percentiles | null): string {
  return spread === null ? '-' : `p50 ${duration(spread.p50)}, p90 ${duration(spread.p90)}`
}
