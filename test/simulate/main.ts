/** `npm run simulate -- [--OPTION NUMBER ...]`: what routing policies make of many requests, in simulated time. */
import { parseArgs } from 'node:util'
import { table } from '../bench/report.ts'
import { simulate, type Setting } from './simulate.ts'

const NUMBERS = {
  nodes: { default: 100, least: 1, what: 'encoders, or language models' },
  gateways: { default: 1, least: 1, what: 'gateways, which share nothing' },
  requests: { default: 50_000, least: 10, what: 'requests, a fifth of them before counting begins' },
  keys: { default: 20_000, least: 1, what: 'pictures, or conversations' },
  zipf: { default: 1, least: 0, what: 'exponent of their popularity; 0: all alike' },
  load: { default: 0.8, least: 0.001, what: 'share of what the nodes can do if nothing is found in a cache' },
  cache: { default: 100, least: 0, what: 'pictures, or conversations, that a node keeps' },
  hit: { default: 0.1, least: 0, what: 'what a request takes that is found there, in the time of one that is not' },
  bound: { default: 0, least: 0, what: 'tokens in flight before work spills over from a node, a request has 1,000; 0: the default of the options' },
  seed: { default: 1, least: 0, what: 'another one gives other requests' }
} as const
const WHOLE: readonly string[] = ['nodes', 'gateways', 'requests', 'keys', 'cache', 'bound', 'seed']
const HELP = ['npm run simulate -- [--stage encode|decode] [--OPTION NUMBER ...]', '',
  '  --stage      encode: pictures over encoders (default); decode: turns of conversations over language models',
  ...Object.entries(NUMBERS).map(([name, { default: value, what }]) => `  --${name.padEnd(10)} ${what} (${value})`)].join('\n')

function read (): Setting | string {
  const values: Readonly<Record<string, unknown>> = parseArgs({ options: { help: { type: 'boolean', short: 'h' }, stage: { type: 'string', default: 'encode' }, ...Object.fromEntries(Object.keys(NUMBERS).map(name => [name, { type: 'string' as const }])) } }).values
  if (values.help === true) return HELP
  const { stage } = values
  if (stage !== 'encode' && stage !== 'decode') throw new Error(`--stage must be encode or decode, not ${String(stage)}`)
  const number = (name: keyof typeof NUMBERS): number => {
    const { default: value, least } = NUMBERS[name]
    const given = values[name]
    const found = typeof given === 'string' && given.trim() !== '' ? Number(given) : given === undefined ? value : NaN
    if (!(found >= least && found <= 1e7) || (WHOLE.includes(name) && !Number.isInteger(found))) throw new Error(`--${name} must be a ${WHOLE.includes(name) ? 'whole ' : ''}number from ${least} to 10000000, not ${String(given)}`)
    return found
  }
  return { stage, nodes: number('nodes'), gateways: number('gateways'), requests: number('requests'), keys: number('keys'), zipf: number('zipf'), load: number('load'), cache: number('cache'), hit: number('hit'), bound: number('bound'), seed: number('seed') }
}

try {
  const setting = read()
  if (typeof setting === 'string') console.log(setting)
  else {
    console.log(Object.entries(setting).map(([name, value]) => `${name} ${value}`).join(', ') + '\n')
    console.log(table(['policy', 'found in a cache', 'p50', 'p99', 'imbalance', 'us a plan'], simulate(setting).map(({ policy, hits, p50, p99, imbalance, planUs }) => [policy, `${(hits * 100).toFixed(1)} %`, p50.toFixed(2), p99.toFixed(2), imbalance.toFixed(2), planUs.toFixed(1)])))
  }
} catch (error) {
  console.error(`${(error as Error).message}\nSee npm run simulate -- --help`)
  process.exitCode = 2
}
