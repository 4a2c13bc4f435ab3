import { setTimeout as delay } from 'node:timers/promises'
import { ROLE_TO_WIRE, type Role } from '../../adapters/adapter.ts'
import { addressOf, askJson, GATEWAY_FLAGS, GATEWAY_HELP, type GatewayAddress } from './gateway-client.ts'
import { breakersOf, lastErrors, modelsOf, nodesOf, type NodeRow } from './node-status.ts'
import { duration, jsonText, ProgressLine, table } from './terminal.ts'
import { httpUrl, oneOf, parseFlags, UsageError, withUsage } from './usage.ts'

const HELP = `fastify-epd nodes: the nodes of a running gateway

Usage: fastify-epd nodes [options]                  the nodes and their state
       fastify-epd nodes add URL [--role ROLE] [--model NAME ...] [--speed N]
       fastify-epd nodes remove URL
       fastify-epd nodes drain URL [--wait]         no further requests; those it has go on
       fastify-epd nodes undrain URL

URL is a node's base URL. The adapter of an added node is found by asking it.

Options:
${GATEWAY_HELP}  --role ROLE        encoder, prefill, decode or hybrid (default: what the node says, else hybrid)
  --model NAME       a model that the node serves, may be repeated (default: what the node says)
  --speed N          relative capacity
  --wait             returns when the drained node has nothing left to do
  --json             the answer as JSON
  -h, --help         this text
`

const FLAGS = {
  ...GATEWAY_FLAGS,
  role: { type: 'string' },
  model: { type: 'string', multiple: true },
  speed: { type: 'string' },
  wait: { type: 'boolean', default: false },
  json: { type: 'boolean', default: false },
  help: { type: 'boolean', short: 'h', default: false }
} as const

const ACTIONS = ['list', 'add', 'remove', 'drain', 'undrain'] as const
const ROLES = Object.keys(ROLE_TO_WIRE) as Role[]
/** A node that was added is asked at once; so long the command waits for what comes of it. */
const PROBED_WITHIN_MS = 10_000
const POLL_MS = 200

type Values = ReturnType<typeof parseFlags<{ options: typeof FLAGS, args: string[] }>>['values']

/** `fastify-epd nodes`. */
export function nodesCommand (argv: string[]): Promise<number> {
  return withUsage('nodes', async () => {
    const { values, positionals } = parseFlags({ args: argv, options: FLAGS, allowPositionals: true })
    if (values.help) {
      process.stdout.write(HELP)
      return 0
    }
    const action = oneOf('the action', positionals[0] ?? 'list', ACTIONS)
    refuseOthers(action, values)
    const gateway = addressOf(values)
    if (action === 'list') {
      if (positionals.length > 1) throw new UsageError(`list takes no URL: '${positionals[1]}'`)
      return await list(gateway, values.json)
    }
    if (positionals.length !== 2) throw new UsageError(`${action} takes the URL of one node`)
    const node = httpUrl('the node', positionals[1]!)
    if (action === 'add') return await add(gateway, node, values)
    if (action === 'remove') return await remove(gateway, node, values.json)
    return await drain(gateway, action, node, values)
  })
}

/** A flag that an action does not read is a mistake: it would be believed. */
function refuseOthers (action: (typeof ACTIONS)[number], { role, model, speed, wait }: Values): void {
  if (action !== 'add' && (role !== undefined || model !== undefined || speed !== undefined)) throw new UsageError('--role, --model and --speed are for add')
  if (action !== 'drain' && wait) throw new UsageError('--wait is for drain')
}

async function list (gateway: GatewayAddress, json: boolean): Promise<number> {
  const nodes = await nodesOf(gateway)
  const errors = await lastErrors(gateway)
  if (json) process.stdout.write(jsonText(nodes.map(node => ({ ...node, lastError: errors.get(node.url) ?? null })), 2))
  else process.stdout.write(nodes.length === 0 ? 'the gateway has no nodes; fastify-epd nodes add URL adds one\n' : renderNodes(nodes, errors))
  return 0
}

/** What is wrong with a node, or else what was. */
function renderNodes (nodes: readonly NodeRow[], errors: ReadonlyMap<string, string>): string {
  return table([
    ['NODE', 'ROLE', 'ADAPTER', 'MODELS', 'HEALTH', 'BREAKERS', 'IN FLIGHT', 'VISION TOKENS', 'LATELY', 'LAST ERROR OR NOTE'],
    ...nodes.map(node => [
      node.url, node.role, node.adapter, modelsOf(node), node.health, breakersOf(node), String(node.unfinished), String(node.vision_tokens),
      node.latency.length === 0 ? '-' : duration(node.latency.reduce((sum, seconds) => sum + seconds, 0) * 1_000 / node.latency.length),
      node.health === 'healthy' ? errors.get(node.url) ?? node.notes.join('; ') : node.notes.join('; ')
    ])
  ])
}

async function add (gateway: GatewayAddress, url: string, { role, model = [], speed, json }: Values): Promise<number> {
  const status = {
    ...(role === undefined ? {} : { role: ROLE_TO_WIRE[oneOf('--role', role, ROLES)] }),
    ...(model.length === 0 ? {} : { models: model }),
    ...(speed === undefined ? {} : { speed: speedOf(speed) })
  }
  const answer = await askJson(gateway, '/nodes/add', { url, status })
  if (answer !== 'Added successfully') throw new Error(`the gateway did not add ${url}: ${String(answer)}; its log says why`)
  const line = new ProgressLine()
  const end = performance.now() + PROBED_WITHIN_MS
  let node = await find(gateway, url)
  while ((node?.health === 'unknown' || node?.health === 'initialising') && performance.now() < end) {
    line.update(`added ${url}; waiting for its first answer`)
    await delay(POLL_MS)
    node = await find(gateway, url)
  }
  line.clear()
  if (node === undefined) throw new Error(`${url} was added, but the gateway does not list it`)
  process.stdout.write(json ? jsonText(node, 2) : 'added\n' + renderNodes([node], new Map()))
  return 0
}

async function remove (gateway: GatewayAddress, url: string, json: boolean): Promise<number> {
  const answer = await askJson(gateway, '/nodes/remove', { url })
  if (answer !== 'Deleted successfully') throw new Error(`the gateway has no node ${url}; fastify-epd nodes lists those that it has`)
  process.stdout.write(json ? jsonText({ removed: url }) : `removed ${url}\n`)
  return 0
}

async function drain (gateway: GatewayAddress, action: 'drain' | 'undrain', url: string, { wait, json }: Values): Promise<number> {
  let answer = await askJson(gateway, `/nodes/${action}`, { url }) as { url: string, health: string, unfinished: number }
  const line = new ProgressLine()
  // Asking again changes nothing, and answers what the node still has.
  if (wait) {
    while (answer.unfinished > 0) {
      line.update(`draining ${url}: ${answer.unfinished} in flight`)
      await delay(POLL_MS)
      answer = await askJson(gateway, '/nodes/drain', { url }) as typeof answer
    }
  }
  line.clear()
  process.stdout.write(json ? jsonText(answer) : table([[answer.url, answer.health, `${answer.unfinished} in flight`]]))
  return 0
}

/** By the URL that was given: the gateway keeps its spelling. */
async function find (gateway: GatewayAddress, url: string): Promise<NodeRow | undefined> {
  const nodes = await nodesOf(gateway)
  return nodes.find(node => node.url === url) ?? nodes.find(node => URL.canParse(node.url) && new URL(node.url).href === new URL(url).href)
}

function speedOf (text: string): number {
  const speed = Number(text)
  if (!/^\d+(\.\d+)?$/.test(text) || speed <= 0) throw new UsageError(`--speed must be a number above 0, not '${text}'`)
  return speed
}
