/**
 * `npm run test:kubernetes`: discovery and the manifests before a real API server. Not in CI, installs nothing: EPD_ETCD and
 * EPD_KUBE_APISERVER name the programs, kubectl and openssl are those of the system.
 */
import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { parseAllDocuments } from 'yaml'
import type { Found } from '../../plugin/discovery/found.ts'
import { followPods } from '../../plugin/discovery/kubernetes.ts'
import { startCli } from '../helper/cli.ts'
import { post } from '../helper/fake-gateway.ts'
import { ask, modelServer, well } from '../helper/model-server.ts'
import { packageRoot } from '../helper/package-root.ts'
import { until } from '../helper/until.ts'
import { RealKubernetes } from './api-server.ts'

const { EPD_ETCD: etcd, EPD_KUBE_APISERVER: apiServer, EPD_KUBECTL: kubectl = 'kubectl' } = process.env
if (etcd === undefined || apiServer === undefined) {
  console.error(`Set EPD_ETCD and EPD_KUBE_APISERVER to the two programs of a Kubernetes release:
  EPD_ETCD=/opt/etcd EPD_KUBE_APISERVER=/opt/kube-apiserver npm run test:kubernetes
EPD_KUBECTL names kubectl where it is not on the path. openssl must be there too. EPD_KUBERNETES_LOG=1 shows what they log.`)
  process.exit(2)
}

// An API server starts within seconds; on a busy machine within minutes.
t.setTimeout(0)
const NAMESPACE = 'vlm'
const LABELS = { app: 'vllm' }
const deploy = join(packageRoot(), 'deploy')
const kubernetes = await RealKubernetes.start(t, { etcd, apiServer, kubectl })
t.comment(execFileSync(apiServer, ['--version'], { encoding: 'utf8' }).trim(), execFileSync(etcd, ['--version'], { encoding: 'utf8' }).split('\n')[0]!)

/** Manifests of deploy/ without what needs a definition that comes with the Prometheus operator. */
function manifests (): string {
  const all = parseAllDocuments(execFileSync(kubectl, ['kustomize', join(deploy, 'kubernetes-discovery')], { encoding: 'utf8' })).map(document => document.toJS() as { kind: string })
  return JSON.stringify({ apiVersion: 'v1', kind: 'List', items: all.filter(({ kind }) => kind !== 'ServiceMonitor') })
}

interface Following {
  readonly given: Found[][]
  readonly reasons: string[]
}

async function follow (t: Test, kubeconfig: string, times?: Parameters<typeof followPods>[3]): Promise<Following> {
  const following: Following = { given: [], reasons: [] }
  const ignore = (): void => {}
  const log = { debug: ignore, info: ignore, error: ignore, warn: ({ reason }: { reason?: string }) => { following.reasons.push(reason!) } }
  t.teardown(await followPods({ selector: 'app=vllm', namespace: NAMESPACE, port: 8000, roleLabel: 'epd/role', kubeconfig }, log, found => { following.given.push([...found]) }, times))
  return following
}

async function has (following: Following, ...hosts: readonly string[]): Promise<void> {
  await until(() => following.given.length > 0 && String(following.given.at(-1)!.map(({ host }) => host).sort()) === String(hosts), `the pods are ${String(hosts)}, not ${JSON.stringify(following.given.at(-1))}`, 120_000)
}

await t.test('the API server takes all manifests', async t => {
  kubernetes.kubectl(['create', 'namespace', NAMESPACE])
  kubernetes.kubectl(['--namespace', NAMESPACE, 'create', 'serviceaccount', 'default'])
  const applied = kubernetes.kubectl(['apply', '--filename', '-'], manifests()).trim().split('\n')
  for (const kind of ['deployment.apps', 'service', 'horizontalpodautoscaler.autoscaling', 'poddisruptionbudget.policy', 'networkpolicy.networking.k8s.io', 'serviceaccount', 'role.rbac.authorization.k8s.io', 'rolebinding.rbac.authorization.k8s.io']) {
    t.ok(applied.some(line => line.startsWith(`${kind}/`)), kind)
  }
})

await t.test('with the rights of deploy/ pods come, change and go', async t => {
  kubernetes.setPod(NAMESPACE, 'a', LABELS, { ip: '127.0.0.2' })
  kubernetes.setPod(NAMESPACE, 'b', LABELS, { ip: '127.0.0.3', ready: false })
  kubernetes.setPod(NAMESPACE, 'other', { app: 'other' }, { ip: '127.0.0.9' })
  const following = await follow(t, kubernetes.configOf(NAMESPACE, 'fastify-epd'))
  await has(following, '127.0.0.2')
  kubernetes.setPod(NAMESPACE, 'b', LABELS, { ip: '127.0.0.3' })
  await has(following, '127.0.0.2', '127.0.0.3')
  kubernetes.setPod(NAMESPACE, 'c', { ...LABELS, 'epd/role': 'encoder' }, { ip: 'fd00::4' })
  await has(following, '127.0.0.2', '127.0.0.3', 'fd00::4')
  t.match(following.given.at(-1)!.find(({ host }) => host === 'fd00::4'), { role: 'encoder' })
  kubernetes.deletePod(NAMESPACE, 'a', false)
  await has(following, '127.0.0.3', 'fd00::4')
  kubernetes.deletePod(NAMESPACE, 'a', true)
  kubernetes.kubectl(['--namespace', NAMESPACE, 'label', 'pod', 'c', 'app=other', '--overwrite'])
  await has(following, '127.0.0.3')
  kubernetes.kubectl(['--namespace', NAMESPACE, 'label', 'pod', 'c', 'app=vllm', '--overwrite'])
  await has(following, '127.0.0.3', 'fd00::4')
  t.same(following.reasons, [])
})

await t.test('an account without rights is refused in the server\'s words, until it has them', async t => {
  kubernetes.kubectl(['--namespace', NAMESPACE, 'create', 'serviceaccount', 'late'])
  const following = await follow(t, kubernetes.configOf(NAMESPACE, 'late'))
  await until(() => following.reasons.length > 0, 'it is refused', 120_000)
  t.match(following.reasons[0], /^403 pods is forbidden: User "system:serviceaccount:vlm:late" cannot list resource "pods"/)
  kubernetes.kubectl(['--namespace', NAMESPACE, 'create', 'rolebinding', 'late', '--role=fastify-epd-discovery', `--serviceaccount=${NAMESPACE}:late`])
  await has(following, '127.0.0.3', 'fd00::4')
})

await t.test('a watch that the server ends is resumed without a list', async t => {
  const times = { answer: 60_000, watch: 1_000, steady: 500, pause: 100, maxPause: 100 }
  const following = await follow(t, kubernetes.configOf(NAMESPACE, 'fastify-epd'), times)
  await has(following, '127.0.0.3', 'fd00::4')
  for (let i = 0; i < 3; i++) {
    await delay(2 * times.watch)
    kubernetes.setPod(NAMESPACE, 'd', LABELS, { ip: '127.0.0.5', ready: i % 2 === 0 })
    await has(following, ...(i % 2 === 0 ? ['127.0.0.3', '127.0.0.5', 'fd00::4'] : ['127.0.0.3', 'fd00::4']))
  }
  kubernetes.deletePod(NAMESPACE, 'd', true)
  await has(following, '127.0.0.3', 'fd00::4')
  t.same(following.reasons, [])
})

for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
  await t.test(`an API server that ends by ${signal} and comes back costs no node`, async t => {
    const following = await follow(t, kubernetes.configOf(NAMESPACE, 'fastify-epd'))
    await has(following, '127.0.0.3', 'fd00::4')
    await kubernetes.stop(signal)
    await until(() => following.reasons.length > 0, 'it is missed', 120_000)
    await kubernetes.start()
    kubernetes.setPod(NAMESPACE, 'd', LABELS, { ip: '127.0.0.5' })
    await has(following, '127.0.0.3', '127.0.0.5', 'fd00::4')
    kubernetes.deletePod(NAMESPACE, 'd', true)
    await has(following, '127.0.0.3', 'fd00::4')
    t.ok(following.given.every(found => found.length >= 2), 'they were there all the time')
    t.comment(following.reasons.join('; '))
  })
}

await t.test('a version that the server has forgotten (410) is no failure: all is listed', async t => {
  // Its watch ends after a second, and in the pause after it the server forgets.
  const following = await follow(t, kubernetes.configOf(NAMESPACE, 'fastify-epd'), { answer: 60_000, watch: 1_000, steady: 600_000, pause: 30_000, maxPause: 30_000 })
  await has(following, '127.0.0.3', 'fd00::4')
  await delay(3_000)
  kubernetes.setPod(NAMESPACE, 'd', LABELS, { ip: '127.0.0.5' })
  await kubernetes.stop('SIGKILL')
  await kubernetes.start()
  t.match(kubernetes.kubectl(['get', '--raw', `/api/v1/namespaces/${NAMESPACE}/pods?watch=true&resourceVersion=1&timeoutSeconds=1`]), /"type":"ERROR",.*"code":410/)
  await has(following, '127.0.0.3', '127.0.0.5', 'fd00::4')
  kubernetes.deletePod(NAMESPACE, 'd', true)
  await has(following, '127.0.0.3', 'fd00::4')
  t.same(following.reasons, [])
})

await t.test('serve answers by a pod that it has found, and drains one that goes', async t => {
  const server = await modelServer(t, well)
  const { hostname, port } = new URL(server.url)
  const labels = { app: 'served' }
  kubernetes.setPod(NAMESPACE, 'served', labels, { ip: hostname })
  const config = join(t.testdir({}), 'epd.json')
  writeFileSync(config, JSON.stringify({ discover: [{ kubernetes: { selector: 'app=served', port: Number(port), kubeconfig: kubernetes.configOf(NAMESPACE, 'fastify-epd') }, adapter: 'openai' }], server: { port: 0 } }))
  const { url, stop } = await startCli(t, ['serve', '--config', config, '--log-level', 'error'])
  await until(async () => (await fetch(`${url}/readyz`)).ok, 'the pod is a node', 120_000, 50)
  t.equal((await post(`${url}/v1/chat/completions`, ask())).status, 200)
  kubernetes.setPod(NAMESPACE, 'served', labels, { ip: hostname, ready: false })
  await until(async () => (await fetch(`${url}/readyz`)).status === 503, 'it is one no longer', 120_000, 50)
  t.equal(await stop(), 0)
})
