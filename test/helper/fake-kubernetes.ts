/** A fake of an API server that lists and watches pods as Kubernetes documents it: resource versions, bookmarks, 410 Gone. */
import { once } from 'node:events'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import type { Test } from 'tap'

export interface Pod {
  readonly ip: string
  readonly labels: Readonly<Record<string, string>>
  readonly ready?: boolean
  readonly ending?: boolean
}

export class FakeKubernetes {
  /** For the option `kubeconfig`. */
  kubeconfig = ''
  readonly lists: string[] = []
  /** Resource versions from which clients have watched. */
  readonly watches: string[] = []
  /** All calls are answered 401, as those without the token. */
  refusing = false
  refused = 0
  /** Answers in place of the fake where it returns true. */
  instead: ((call: 'list' | 'watch', response: ServerResponse) => boolean) | undefined
  readonly #pods = new Map<string, { readonly pod: Pod, readonly version: number }>()
  readonly #watchers = new Set<ServerResponse>()
  readonly #log: Array<{ readonly version: number, readonly line: string }> = []
  #version = 100
  /** The oldest version that is remembered. */
  #oldest = 0

  static async start (t: Test): Promise<FakeKubernetes> {
    const fake = new FakeKubernetes()
    const server = createServer((request, response) => {
      const url = new URL(request.url!, 'http://kubernetes')
      if (request.headers.authorization !== 'Bearer sesame' || fake.refusing) { fake.refused++; response.writeHead(401, { 'content-type': 'application/json' }).end(JSON.stringify({ kind: 'Status', code: 401, message: 'Unauthorized' })); return }
      if (url.pathname !== '/api/v1/namespaces/vlm/pods') { response.writeHead(404).end(); return }
      const isWatch = url.searchParams.get('watch') === 'true'
      if (fake.instead?.(isWatch ? 'watch' : 'list', response) === true) return
      if (isWatch) fake.#watch(url.searchParams, response)
      else fake.#list(url.searchParams, response)
    })
    t.teardown(() => { server.closeAllConnections(); server.close() })
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    const config = {
      apiVersion: 'v1',
      kind: 'Config',
      clusters: [{ name: 'c', cluster: { server: `http://127.0.0.1:${port}`, 'insecure-skip-tls-verify': true } }],
      users: [{ name: 'u', user: { token: 'sesame' } }],
      contexts: [{ name: 'x', context: { cluster: 'c', user: 'u', namespace: 'vlm' } }],
      'current-context': 'x'
    }
    fake.kubeconfig = join(t.testdir({ kubeconfig: JSON.stringify(config) }), 'kubeconfig')
    return fake
  }

  set (name: string, pod: Pod): void {
    const type = this.#pods.has(name) ? 'MODIFIED' : 'ADDED'
    this.#pods.set(name, { pod, version: ++this.#version })
    this.#tell(type, podOf(name, pod, this.#version))
  }

  delete (name: string): void {
    const { pod } = this.#pods.get(name)!
    this.#pods.delete(name)
    this.#tell('DELETED', podOf(name, pod, ++this.#version))
  }

  bookmark (): void {
    this.#tell('BOOKMARK', { kind: 'Pod', apiVersion: 'v1', metadata: { resourceVersion: String(++this.#version) } })
  }

  /** Watches end, as they do after some minutes. */
  endWatches (): void {
    for (const response of this.#watchers) response.end()
    this.#watchers.clear()
  }

  /** What has happened until now can't be watched any more. */
  forget (): void {
    this.#oldest = ++this.#version
  }

  #list (query: URLSearchParams, response: ServerResponse): void {
    this.lists.push(query.get('labelSelector') ?? '')
    const items = [...this.#pods].filter(([, { pod }]) => matches(pod, query)).map(([name, { pod, version }]) => podOf(name, pod, version))
    response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify({ kind: 'PodList', apiVersion: 'v1', metadata: { resourceVersion: String(this.#version) }, items }))
  }

  #watch (query: URLSearchParams, response: ServerResponse): void {
    const from = query.get('resourceVersion') ?? ''
    this.watches.push(from)
    response.writeHead(200, { 'content-type': 'application/json' })
    if (Number(from) < this.#oldest) {
      response.end(JSON.stringify({ type: 'ERROR', object: { kind: 'Status', code: 410, reason: 'Expired', message: 'too old resource version' } }) + '\n')
      return
    }
    response.flushHeaders()
    for (const { version, line } of this.#log) if (version > Number(from)) response.write(line)
    this.#watchers.add(response)
    response.on('close', () => { this.#watchers.delete(response) })
  }

  #tell (type: string, object: object): void {
    const line = JSON.stringify({ type, object }) + '\n'
    this.#log.push({ version: this.#version, line })
    for (const response of this.#watchers) response.write(line)
  }
}

/** Of selectors the fake knows `name=value`; all pods of a test have the same. */
function matches ({ labels }: Pod, query: URLSearchParams): boolean {
  const [name, value] = (query.get('labelSelector') ?? '').split('=') as [string, string]
  return labels[name] === value
}

function podOf (name: string, { ip, labels, ready = true, ending = false }: Pod, version: number): object {
  return {
    kind: 'Pod',
    apiVersion: 'v1',
    metadata: { name, namespace: 'vlm', labels, resourceVersion: String(version), ...(ending ? { deletionTimestamp: '2026-01-01T00:00:00Z' } : {}) },
    status: { podIP: ip, conditions: [{ type: 'Ready', status: ready ? 'True' : 'False' }] }
  }
}
