import { existsSync } from 'node:fs'
import { DEFAULT_CONFIG_FILES, loadConfig } from '../config.ts'
import { addressOf, GATEWAY_FLAGS, GATEWAY_HELP, type GatewayAddress } from '../gateway-client.ts'
import { modelsOf } from '../node-status.ts'
import { clean, jsonText, ProgressLine, table } from '../terminal.ts'
import { parseFlags, withUsage } from '../usage.ts'
import { diagnose, type Diagnosis, type ModelFinding, type Patient, type Problem } from './diagnosis.ts'
import { patientsOfConfig, patientsOfGateway } from './sources.ts'

const HELP = `fastify-epd doctor: which nodes can work together, what they can serve, and what is missing

Usage: fastify-epd doctor [--config FILE] [--url GATEWAY]

With --config it asks each node of the file from here, and makes no links. With --url it asks a running gateway, which
also knows nodes that registered, links and breakers. With both it also says which nodes of the file the gateway does
not have. With neither it takes the configuration of the current folder (epd.config.json, ...), or else the gateway at
the default URL.

Options:
  --config FILE      configuration, as JSON or YAML
${GATEWAY_HELP}  --json             the findings as JSON
  -h, --help         this text

Exit code 0: all is well; 1: there are problems.
`

const FLAGS = {
  config: { type: 'string' },
  url: { type: 'string' },
  'admin-key': { type: 'string' },
  json: { type: 'boolean', default: false },
  help: { type: 'boolean', short: 'h', default: false }
} as const

/** `fastify-epd doctor`. */
export function doctorCommand (argv: string[]): Promise<number> {
  return withUsage('doctor', async () => {
    const { values } = parseFlags({ args: argv, options: FLAGS })
    if (values.help) {
      process.stdout.write(HELP)
      return 0
    }
    const fromFile = values.config !== undefined || (values.url === undefined && DEFAULT_CONFIG_FILES.some(name => existsSync(name)))
    const gateway = values.url !== undefined || !fromFile ? addressOf({ ...values, url: values.url ?? GATEWAY_FLAGS.url.default }) : undefined
    const configured = fromFile ? await ofConfig(values.config) : undefined
    const running = gateway === undefined ? undefined : await ofGateway(gateway)
    const parts = [configured, running].filter(part => part !== undefined)
    const missing = configured === undefined || running === undefined ? [] : unknownTo(running.diagnosis.nodes, configured.diagnosis.nodes)
    if (values.json) process.stdout.write(jsonText({ sources: parts.map(({ title, diagnosis }) => ({ source: title, ...diagnosis, nodes: diagnosis.nodes.map(({ links: _links, info, ...node }) => ({ ...node, backend: info?.backend ?? null })) })), problems: missing }, 2))
    else process.stdout.write(parts.map(({ title, diagnosis }) => render(title, diagnosis)).join('\n') + problems(missing))
    return missing.length > 0 || parts.some(({ diagnosis }) => diagnosis.problems.length > 0) ? 1 : 0
  })
}

interface Examination { readonly title: string, readonly diagnosis: Diagnosis }

async function ofConfig (given: string | undefined): Promise<Examination> {
  const { file, raw } = await loadConfig(given)
  const line = new ProgressLine()
  const nodes = await patientsOfConfig(raw, (asked, of) => { line.update(`asking the nodes: ${asked} of ${of}`) })
  line.clear()
  const diagnosis = diagnose(nodes)
  const title = `configuration ${file}`
  if (nodes.length > 0) return { title, diagnosis }
  const hint = (raw.discover ?? []).length > 0 ? 'no nodes in the file: they are discovered. --url asks a running gateway' : raw.embedded === false ? 'no nodes: the gateway waits for nodes that register. --url asks a running one' : 'no nodes: serve starts engines of its own'
  return { title, diagnosis: { ...diagnosis, hints: [hint] } }
}

async function ofGateway (gateway: GatewayAddress): Promise<Examination> {
  const nodes = await patientsOfGateway(gateway)
  const diagnosis = diagnose(nodes)
  const none: Problem[] = nodes.length > 0 ? [] : [{ what: 'the gateway has no nodes', remedy: 'name some in its configuration, or fastify-epd nodes add URL' }]
  return { title: `gateway ${gateway.url}`, diagnosis: { ...diagnosis, problems: [...none, ...diagnosis.problems] } }
}

/** Nodes of the file that the gateway does not have. */
function unknownTo (running: readonly Patient[], configured: readonly Patient[]): Problem[] {
  const known = new Set(running.map(({ id }) => new URL(id).href))
  return configured.filter(({ id }) => !known.has(new URL(id).href)).map(({ id }) => ({ what: `the gateway does not have ${id}, which is in the configuration`, remedy: 'it runs with another file, or has not read it again: POST /epd/reload' }))
}

function render (title: string, { nodes, pairs, models, problems: found, hints }: Diagnosis): string {
  const blocks = [clean(title) + '\n']
  if (nodes.length > 0) blocks.push('nodes\n' + table(nodes.map(node => [`  ${node.state === 'healthy' ? 'ok' : 'NO'}`, node.id, node.role, node.adapter, modelsOf(node), node.info?.backend ?? '-', [node.state === 'healthy' ? '' : node.state, ...node.notes].filter(Boolean).join(': ')])))
  if (pairs.length > 0) blocks.push('pairs\n' + table(pairs.map(({ from, to, what, works, how }) => [`  ${works ? 'ok' : 'NO'}`, `${from} -> ${to}`, what, how])))
  if (models.length > 0) blocks.push('models\n' + table(models.map(model => [`  ${model.text.length > 0 ? 'ok' : 'NO'}`, model.model, plansOf(model)])))
  for (const hint of hints) blocks.push(`note: ${clean(hint)}\n`)
  return blocks.join('\n') + problems(found) + (found.length === 0 ? '\nno problems found\n' : '')
}

function plansOf ({ text, media }: ModelFinding): string {
  return `text: ${text.join(', ') || 'none'}; pictures: ${media.join(', ') || 'none'}`
}

function problems (found: readonly Problem[]): string {
  return found.length === 0 ? '' : '\nproblems\n' + found.map(({ what, remedy }) => `  - ${clean(what)}\n    ${clean(remedy)}\n`).join('')
}
