/** What is in deploy/ says of the gateway what is true. Its own tools lint it: deploy/lint.sh. */
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { parse, parseAllDocuments } from 'yaml'
import { loadConfig } from '../../plugin/cli/config.ts'
import { runCommand } from '../helper/cli.ts'
import { buildGateway } from '../helper/fake-gateway.ts'
import { packageRoot } from '../helper/package-root.ts'

const folder = join(packageRoot(), 'deploy')
const read = (file: string): string => readFileSync(join(folder, file), 'utf8')
const yaml = (file: string): any => parse(read(file), { merge: true })

t.test('the configurations pass serve --check', async t => {
  const dir = t.testdir({ 'api-key': 'k' })
  for (const file of ['compose.config.yaml', 'kubernetes/epd.config.yaml', 'kubernetes-discovery/epd.config.yaml']) {
    const path = join(dir, file.replaceAll('/', '-'))
    writeFileSync(path, read(file).replaceAll(/\$\{file:[^}]*\}/g, `\${file:${dir}/api-key}`))
    const { raw } = await loadConfig(path)
    t.equal(raw.server?.host, '0.0.0.0')
    t.equal(raw.timeouts?.grace, 60_000)
    t.ok((raw.apiKeys ?? []).length > 0, 'beyond loopback there are keys')
    t.match(await runCommand(['serve', '--check', '--config', path]), { code: 0, stdout: /: ok, \d nodes\n/, stderr: '' })
  }
})

t.test('the commands name flags that serve has', async t => {
  const { stdout: help } = await runCommand(['serve', '--help'])
  const commands: Record<string, string[]> = {
    Dockerfile: JSON.parse(/^CMD (.*)$/m.exec(read('Dockerfile'))?.[1] ?? '[]'),
    Deployment: yaml('kubernetes/deployment.yaml').spec.template.spec.containers[0].args,
    unit: /^ExecStart=.* fastify-epd (.*)$/m.exec(read('fastify-epd.service'))?.[1]?.split(' ') ?? []
  }
  for (const [name, [command, ...args]] of Object.entries(commands)) {
    t.equal(command, 'serve', name)
    const flags = args.filter(arg => arg.startsWith('--'))
    t.ok(flags.length > 0 && flags.every(flag => new RegExp(`${flag}\\b`).test(help)), `${name}: ${flags.join(' ')}`)
  }
})

t.test('every manifest is listed, and selects what the Deployment labels', async t => {
  const { resources, labels } = yaml('kubernetes/kustomization.yaml')
  t.same([...resources].sort(), readdirSync(join(folder, 'kubernetes')).filter(file => !['kustomization.yaml', 'epd.config.yaml'].includes(file)).sort())
  const label = labels[0].pairs
  t.same(yaml('kubernetes/deployment.yaml').spec.selector.matchLabels, label)
  t.same(yaml('kubernetes/service.yaml').spec.selector, label)
  t.same(yaml('kubernetes/disruption.yaml').spec.selector.matchLabels, label)
  t.same(yaml('kubernetes/network.yaml').spec.podSelector.matchLabels, label)
  t.same(yaml('kubernetes/monitor.yaml').spec.selector.matchLabels, label)
  for (const file of resources) t.same(parseAllDocuments(read(`kubernetes/${file}`)).flatMap(({ errors }) => errors), [], file)
})

t.test('a gateway that finds pods may list and watch them, and runs with that account', async t => {
  const { resources, patches } = yaml('kubernetes-discovery/kustomization.yaml')
  t.same(resources, ['../kubernetes', 'rbac.yaml', 'network.yaml'])
  const [account, role, binding] = parseAllDocuments(read('kubernetes-discovery/rbac.yaml')).map(document => document.toJS())
  t.match(role.rules, [{ apiGroups: [''], resources: ['pods'], verbs: ['get', 'list', 'watch'] }])
  t.match(binding, { roleRef: { name: role.metadata.name }, subjects: [{ kind: 'ServiceAccount', name: account.metadata.name }] })
  t.match(parse(patches[0].patch).spec.template.spec, { serviceAccountName: account.metadata.name, automountServiceAccountToken: true })
  t.match(yaml('kubernetes-discovery/network.yaml').spec.podSelector, yaml('kubernetes/network.yaml').spec.podSelector)
})

t.test('probes, metrics and ports are those of the gateway', async t => {
  const { url } = await buildGateway(t)
  const { spec: { template: { spec } } } = yaml('kubernetes/deployment.yaml')
  const [container] = spec.containers
  for (const probe of ['startupProbe', 'livenessProbe', 'readinessProbe']) t.not((await fetch(url + container[probe].httpGet.path)).status, 404, probe)
  const metrics = await (await fetch(url + yaml('kubernetes/monitor.yaml').spec.endpoints[0].path)).text()
  const { metric } = yaml('kubernetes/autoscaling.yaml').spec.metrics[0].pods
  t.match(metrics, new RegExp(`^${metric.name}(\\{| )`, 'm'))
  const { port } = yaml('kubernetes/epd.config.yaml').server
  t.same(container.ports, [{ name: 'http', containerPort: port }])
  t.equal(yaml('kubernetes/service.yaml').spec.ports[0].targetPort, 'http')
  t.same(yaml('kubernetes/network.yaml').spec.ingress[0].ports, [{ port }])
  t.equal(Number(/^EXPOSE (\d+)$/m.exec(read('Dockerfile'))?.[1]), port)
  t.ok(read('Dockerfile').includes(`127.0.0.1:${port}/livez`), 'HEALTHCHECK')
  const sleep = Number(container.lifecycle.preStop.exec.command[1])
  t.ok(spec.terminationGracePeriodSeconds > sleep + 60, 'there is time for preStop and timeouts.grace')
})

t.test('nothing runs as root or writes to its image', async t => {
  const { spec } = yaml('kubernetes/deployment.yaml').spec.template
  t.match(spec, { securityContext: { runAsNonRoot: true }, containers: [{ securityContext: { readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: { drop: ['ALL'] } } }] })
  t.match(yaml('compose.yaml').services.gateway, { read_only: true, cap_drop: ['ALL'] })
  t.match(read('Dockerfile'), /^USER 1000$/m)
  t.match(read('fastify-epd.service'), /^DynamicUser=yes$/m)
  const grace = Number(/^TimeoutStopSec=(\d+)$/m.exec(read('fastify-epd.service'))?.[1])
  t.ok(grace > 60)
})

t.test('secrets that lie in deploy/ come into no image, package or commit', async t => {
  const secrets = Object.values<{ file: string }>(yaml('compose.yaml').secrets).map(({ file }) => join('deploy', file))
  t.ok(secrets.length > 0)
  const lines = (file: string): string[] => readFileSync(join(packageRoot(), file), 'utf8').split('\n')
  const { files } = JSON.parse(lines('package.json').join('\n')) as { files: string[] }
  for (const secret of secrets) {
    t.ok(lines('.gitignore').includes(secret), `${secret} in .gitignore`)
    t.ok(lines('.dockerignore').includes(secret), `${secret} in .dockerignore`)
    t.ok(files.includes(`!${secret}`), `${secret} in the files of package.json`)
  }
})

t.test('each test that docs/production.md names is there, and each row names one', async t => {
  const rows = readFileSync(join(packageRoot(), 'docs', 'production.md'), 'utf8').split('\n').filter(line => line.startsWith('|') && line.includes('| yes |'))
  t.ok(rows.length > 20)
  for (const row of rows) {
    const tests = [...row.matchAll(/`(test\/[^`]+\.ts)`/g)].map(found => found[1]!)
    t.ok(tests.length > 0 && tests.every(file => existsSync(join(packageRoot(), file))), row.slice(0, 80))
  }
})
