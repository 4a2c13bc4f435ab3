/** The Grafana dashboard and the alert rules: every metric and label that they name is in a scrape of gateway and engine. */
import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { parse } from 'yaml'
import { startApiServer } from '../../engines/server/index.ts'
import { FakeEngine } from '../helper/fake-engine.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { modelServer, telling } from '../helper/model-server.ts'
import { packageRoot } from '../helper/package-root.ts'
import { until } from '../helper/until.ts'

const PATH = '/v1/chat/completions'
/** Prometheus' own. */
const OF_PROMETHEUS = ['job', 'instance']
const deploy = (name: string): Promise<string> => readFile(join(packageRoot(), 'deploy', name), 'utf8')

interface Rule { readonly alert: string, readonly expr: string, readonly labels: { readonly severity: string }, readonly annotations: { readonly summary: string, readonly runbook: string } }
interface Panel { readonly id: number, readonly type: string, readonly title: string, readonly gridPos: { readonly x: number, readonly y: number, readonly w: number, readonly h: number }, readonly targets?: ReadonlyArray<{ readonly expr: string, readonly legendFormat: string }> }
interface Dashboard { readonly panels: readonly Panel[], readonly templating: { readonly list: ReadonlyArray<{ readonly name: string, readonly query: string }> }, readonly annotations: { readonly list: ReadonlyArray<{ readonly expr: string }> } }

/** A scrape of a gateway that has served all kinds of requests, and of an engine. */
async function scrape (t: Test): Promise<string> {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const server = await modelServer(t, telling)
  const { url, app } = await buildGateway(t, {
    nodes,
    options: { bypass: 'never', keys: [{ name: 'a', hash: `sha256:${createHash('sha256').update('secret').digest('hex')}` }], nodes: [...nodes.map(node => node.spec), { url: server.url, adapter: 'openai' }] }
  })
  await app.epd.nodes.waitFor(({ models }) => models.includes('m'))
  app.epd.gateway.stats.moved(nodes[0]!.url, nodes[1]!.url, 1)
  const stream = { ...chat('?'), stream: true }
  for (const body of [chat('?'), stream, chat('?', pictureUrl(1)), { ...stream, model: 'm' }, { ...chat('?'), model: 'nobody' }]) {
    await (await post(url + PATH, body, { headers: { authorization: 'Bearer secret' } })).arrayBuffer()
  }
  const api = await startApiServer({ version: '0.0.0', createEngine: async url => new FakeEngine(url) })
  t.teardown(() => api.close())
  const engine = api.engine as FakeEngine
  engine.statuses.RUNNING = 1
  Object.assign(engine.p2p, { refused: { version: 1 } })
  const page = async (of: string): Promise<string> => await (await fetch(`${of}/metrics`)).text()
  // Collections are told of a moment after they ran; garbage brings one about.
  await until(async () => Array.from({ length: 200_000 }, n => ({ n })).length > 0 && (await page(url)).includes('v8js_gc_duration_seconds_count{'), 'a collection is counted')
  return await page(url) + await page(api.url)
}

/** The names of metrics in a PromQL expression, each with the labels that are asked of it. */
function selectors (expression: string): Array<readonly [name: string, labels: readonly string[]]> {
  const bare = expression.replace(/\b(by|without|on|ignoring|group_left|group_right) *\([^)]*\)/g, ' ').replace(/\[[^\]]*\]/g, ' ')
  return [...bare.matchAll(/\b([a-z][a-z0-9_]*_[a-z0-9_]+)\b(?! *\()(?:\{([^}]*)\})?/g)]
    .map(([, name, labels = '']) => [name!, [...labels.matchAll(/([a-z_]+) *[=!]/g)].map(([, label]) => label!)] as const)
}

/** What `by`, `on` and `group_left` name. */
function grouped (expression: string): string[] {
  return [...expression.matchAll(/\b(?:by|on|group_left) *\(([^)]*)\)/g)].flatMap(([, list]) => list!.split(',').map(label => label.trim()))
}

t.test('dashboard and rules name metrics and labels of a real scrape', async t => {
  const { panels, templating, annotations } = JSON.parse(await deploy('grafana-dashboard.json')) as Dashboard
  const { groups } = parse(await deploy('alerts.yml')) as { groups: Array<{ rules: Rule[] }> }
  const rules = groups.flatMap(group => group.rules)
  const targets = panels.flatMap(panel => panel.targets ?? [])
  t.ok(targets.length > 60 && rules.length >= 15)
  const page = await scrape(t)
  const samples = new Map<string, Set<string>>()
  for (const [, name, labels = ''] of page.matchAll(/^([a-z_][a-z0-9_]*)(?:\{(.*)\})? \S+$/gm)) {
    const known = samples.get(name!) ?? new Set(OF_PROMETHEUS)
    for (const [, label] of labels.matchAll(/([a-z_]+)="/g)) known.add(label!)
    samples.set(name!, known)
  }
  const variables = templating.list.filter(({ query }) => query.startsWith('label_values(')).map(({ query }) => /^label_values\((.*), *(\w+)\)$/.exec(query)!)
  const asked = [...targets.map(({ expr }) => expr), ...rules.map(({ expr }) => expr), ...annotations.list.map(({ expr }) => expr), ...variables.map(([, metric]) => metric!)]
  const all = new Set([...samples.values()].flatMap(labels => [...labels]))
  for (const expression of asked) {
    const found = selectors(expression)
    t.ok(found.length > 0, expression)
    for (const [name, labels] of found) {
      if (!samples.has(name)) t.fail(`${name} in ${expression}`)
      for (const label of labels) if (samples.get(name)?.has(label) === false) t.fail(`label ${label} of ${name} in ${expression}`)
    }
    for (const label of grouped(expression)) if (!all.has(label)) t.fail(`label ${label} in ${expression}`)
    t.equal(expression.split('(').length, expression.split(')').length, expression)
  }
  for (const { legendFormat } of targets) for (const [, label] of legendFormat.matchAll(/\{\{(\w+)\}\}/g)) if (!all.has(label!)) t.fail(`label ${label} in ${legendFormat}`)
  const names = new Set(templating.list.map(({ name }) => name))
  for (const expression of asked) for (const [, name] of expression.matchAll(/\$(\w+)/g)) if (!names.has(name!) && name !== '__rate_interval') t.fail(`variable ${name} in ${expression}`)
})

t.test('buckets that are asked for by their bound have it, in both formats', async t => {
  const text = await deploy('grafana-dashboard.json') + await deploy('alerts.yml')
  const bounds = [...text.matchAll(/([a-z_]+_bucket)\{[^}]*le=\\?"([\d.]+)/g)]
  t.ok(bounds.length > 5)
  const page = await scrape(t)
  for (const [, name, bound] of bounds) {
    t.ok(page.split('\n').some(line => line.startsWith(name!) && line.includes(`le="${bound}"`)), `${name} ${bound}`)
    t.notOk(Number.isInteger(Number(bound)), 'OpenMetrics writes whole bounds in another way')
  }
})

t.test('panels do not overlap, and each has an id of its own', async t => {
  const { panels } = JSON.parse(await deploy('grafana-dashboard.json')) as Dashboard
  t.equal(new Set(panels.map(({ id }) => id)).size, panels.length)
  const taken = new Map<string, string>()
  for (const { title, gridPos: { x, y, w, h } } of panels) {
    t.ok(x + w <= 24, title)
    for (let column = x; column < x + w; column++) {
      for (let line = y; line < y + h; line++) {
        const other = taken.get(`${column} ${line}`)
        if (other !== undefined) t.fail(`${title} lies on ${other}`)
        taken.set(`${column} ${line}`, title)
      }
    }
  }
  for (const row of ['Overview', 'Service level objectives', 'Stages', 'Nodes']) t.ok(panels.some(({ type, title }) => type === 'row' && title === row), row)
})

t.test('each alert says how bad it is, and what to do about it is in docs/alerts.md', async t => {
  const { groups } = parse(await deploy('alerts.yml')) as { groups: Array<{ rules: Rule[] }> }
  const runbook = await readFile(join(packageRoot(), 'docs', 'alerts.md'), 'utf8')
  const told = [...runbook.matchAll(/^### (\w+)\n(.+)$/gm)].map(([, name]) => name!)
  const rules = groups.flatMap(group => group.rules)
  t.strictSame(told.toSorted(), rules.map(({ alert }) => alert).sort())
  for (const { alert, labels, annotations } of rules) {
    t.ok(['critical', 'warning'].includes(labels.severity), alert)
    t.ok(annotations.summary.length > 10, alert)
    t.equal(annotations.runbook, `docs/alerts.md#${alert.toLowerCase()}`)
  }
})
