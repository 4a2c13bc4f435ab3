/** A real kube-apiserver with a real etcd, on loopback, without nodes, kubelets and controllers: pods are what is written. */
import { execFileSync, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import https from 'node:https'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { freePort } from '../helper/free-port.ts'
import { until } from '../helper/until.ts'

export interface Binaries {
  readonly etcd: string
  readonly apiServer: string
  readonly kubectl: string
}

export interface PodState {
  readonly ip?: string
  readonly ready?: boolean
}

const ADMIN = 'admin-token'

export class RealKubernetes {
  /** Of one that may do everything. */
  readonly kubeconfig: string
  readonly #binaries: Binaries
  readonly #folder: string
  readonly #port: number
  readonly #etcd: string
  #child: ChildProcess | undefined

  private constructor (binaries: Binaries, folder: string, port: number, etcd: string) {
    this.#binaries = binaries
    this.#folder = folder
    this.#port = port
    this.#etcd = etcd
    this.kubeconfig = this.#writeConfig('admin', { token: ADMIN })
  }

  static async start (t: Test, binaries: Binaries): Promise<RealKubernetes> {
    const folder = mkdtempSync(join(tmpdir(), 'epd-kubernetes-'))
    const [port, client, peer] = [await freePort(), await freePort(), await freePort()]
    const [url, peerUrl] = [`http://127.0.0.1:${client}`, `http://127.0.0.1:${peer}`]
    const etcd = run(binaries.etcd, ['--data-dir', join(folder, 'etcd'), '--listen-client-urls', url, '--advertise-client-urls', url, '--listen-peer-urls', peerUrl, '--initial-advertise-peer-urls', peerUrl, '--initial-cluster', `default=${peerUrl}`])
    t.teardown(async () => { await end(etcd, 'SIGKILL'); rmSync(folder, { recursive: true }) })
    const key = join(folder, 'accounts.key')
    execFileSync('openssl', ['genrsa', '-out', key, '2048'], { stdio: 'ignore' })
    execFileSync('openssl', ['rsa', '-in', key, '-pubout', '-out', join(folder, 'accounts.pub')], { stdio: 'ignore' })
    writeFileSync(join(folder, 'tokens.csv'), `${ADMIN},admin,1,system:masters\n`)
    const kubernetes = new RealKubernetes(binaries, folder, port, url)
    t.teardown(async () => { await kubernetes.stop('SIGKILL') })
    await kubernetes.start()
    return kubernetes
  }

  async start (): Promise<void> {
    const file = (name: string): string => join(this.#folder, name)
    this.#child = run(this.#binaries.apiServer, [
      '--etcd-servers', this.#etcd, '--bind-address', '127.0.0.1', '--advertise-address', '127.0.0.1', '--secure-port', String(this.#port), '--cert-dir', this.#folder,
      '--authorization-mode', 'RBAC', '--token-auth-file', file('tokens.csv'), '--service-cluster-ip-range', '10.0.0.0/24',
      '--service-account-issuer', 'https://kubernetes.default.svc', '--service-account-key-file', file('accounts.pub'), '--service-account-signing-key-file', file('accounts.key')
    ])
    await until(async () => await this.#isReady(), 'the API server is ready', 180_000, 200)
  }

  /** SIGTERM ends watches in order, SIGKILL breaks them. */
  async stop (signal: NodeJS.Signals): Promise<void> {
    if (this.#child !== undefined) await end(this.#child, signal)
  }

  kubectl (args: readonly string[], input?: string): string {
    return execFileSync(this.#binaries.kubectl, ['--kubeconfig', this.kubeconfig, ...args], { encoding: 'utf8', stdio: ['pipe', 'pipe', 'pipe'], ...(input === undefined ? {} : { input }) })
  }

  /** The rights of a service account. */
  configOf (namespace: string, account: string): string {
    return this.#writeConfig(account, { token: this.kubectl(['--namespace', namespace, 'create', 'token', account]).trim() }, namespace)
  }

  setPod (namespace: string, name: string, labels: Readonly<Record<string, string>>, { ip, ready = true }: PodState): void {
    const pod = { apiVersion: 'v1', kind: 'Pod', metadata: { name, namespace, labels }, spec: { nodeName: 'a-node', automountServiceAccountToken: false, containers: [{ name: 'server', image: 'vllm' }] } }
    this.kubectl(['apply', '--server-side', '--force-conflicts', '--filename', '-'], JSON.stringify(pod))
    const status = { phase: 'Running', ...(ip === undefined ? {} : { podIP: ip, podIPs: [{ ip }] }), conditions: [{ type: 'Ready', status: ready ? 'True' : 'False' }] }
    this.kubectl(['--namespace', namespace, 'patch', 'pod', name, '--subresource', 'status', '--type', 'merge', '--patch', JSON.stringify({ status })])
  }

  /** As a kubelet does once the containers have ended; without `isOver` the pod stays, and ends. */
  deletePod (namespace: string, name: string, isOver: boolean): void {
    this.kubectl(['--namespace', namespace, 'delete', 'pod', name, '--wait=false', ...(isOver ? ['--grace-period=0', '--force'] : [])])
  }

  #writeConfig (user: string, credentials: object, namespace = 'default'): string {
    const file = join(this.#folder, `${user}.kubeconfig`)
    const certificate = join(this.#folder, 'apiserver.crt')
    writeFileSync(file, JSON.stringify({
      apiVersion: 'v1',
      kind: 'Config',
      clusters: [{ name: 'c', cluster: { server: `https://127.0.0.1:${this.#port}`, 'certificate-authority': certificate } }],
      users: [{ name: user, user: credentials }],
      contexts: [{ name: 'x', context: { cluster: 'c', user, namespace } }],
      'current-context': 'x'
    }))
    return file
  }

  async #isReady (): Promise<boolean> {
    if (this.#child?.exitCode !== null) throw new Error(`the API server ended with ${this.#child?.exitCode}`)
    try {
      const ca = readFileSync(join(this.#folder, 'apiserver.crt'))
      const request = https.get({ host: '127.0.0.1', port: this.#port, path: '/readyz', ca, headers: { authorization: `Bearer ${ADMIN}` } })
      const [answer] = await once(request, 'response')
      answer.resume()
      return answer.statusCode === 200
    } catch {
      return false
    }
  }
}

function run (file: string, args: readonly string[]): ChildProcess {
  const child = spawn(file, args, { stdio: ['ignore', 'ignore', process.env.EPD_KUBERNETES_LOG === '1' ? 'inherit' : 'ignore'] })
  process.once('exit', () => { child.kill('SIGKILL') })
  return child
}

async function end (child: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  const ended = once(child, 'exit')
  child.kill(signal)
  await ended
}
