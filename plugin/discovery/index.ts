/** Nodes that are found: they come into the registry as those that register, and leave it when their last request has ended. */
import type { Log } from '../../adapters/adapter.ts'
import type { NodeOptions, SourceOptions } from '../options/index.ts'
import type { RegistryApi } from '../registry/index.ts'
import { followDns } from './dns.ts'
import type { Found } from './found.ts'

/** How often it is looked whether a node that leaves has ended its last request. Milliseconds. */
const LOOK_MS = 250

interface Host {
  readonly registry: RegistryApi
  readonly log: Log
  readonly options: { readonly discover: readonly SourceOptions[] }
}

export class Discovery {
  readonly #registry: RegistryApi
  readonly #log: Log
  /** What each source has found last, by URL. */
  readonly #found = new Map<string, Map<string, NodeOptions>>()
  /** Nodes that no source finds any more, but have requests. */
  readonly #leaving = new Set<string>()
  readonly #stops: Array<() => void> = []
  #timer: NodeJS.Timeout | undefined

  private constructor ({ registry, log }: Host) {
    this.#registry = registry
    this.#log = log
  }

  static async start (host: Host): Promise<Discovery> {
    const discovery = new Discovery(host)
    for (const [i, source] of host.options.discover.entries()) await discovery.#follow(source, i)
    // A reload that takes a node out of the file leaves it to its source.
    const { registry } = host
    const changed = (): void => { discovery.#sync() }
    registry.on('change', changed)
    discovery.#stops.push(() => { registry.off('change', changed) })
    return discovery
  }

  close (): void {
    clearInterval(this.#timer)
    for (const stop of this.#stops.splice(0)) stop()
  }

  async #follow ({ dns, kubernetes, port, server, scheme, ...node }: SourceOptions, index: number): Promise<void> {
    if (dns !== undefined) this.#stops.push(followDns({ dns, port, server }, this.#log, this.#giver(`dns ${dns}`, index, node, scheme)))
    if (kubernetes === undefined) return
    // An optional package.
    const { followPods } = await import('./kubernetes.ts')
    const { namespace, selector } = kubernetes
    this.#stops.push(await followPods(kubernetes, this.#log, this.#giver(`kubernetes ${namespace === undefined ? '' : `${namespace}/`}${selector}`, index, node, scheme)))
  }

  #giver (name: string, index: number, node: Omit<NodeOptions, 'url'>, scheme = 'http') {
    return (found: readonly Found[]): void => {
      const nodes = found.map(({ host, port, role }) => ({ ...node, ...(role === undefined ? {} : { role }), url: `${scheme}://${host.includes(':') ? `[${host}]` : host}:${port}` }))
      const last = this.#found.get(`${index} ${name}`)
      this.#found.set(`${index} ${name}`, new Map(nodes.map(node => [node.url, node])))
      this.#sync()
      // Its label says another role.
      for (const node of nodes) if (last?.has(node.url) === true && last.get(node.url)!.role !== node.role && this.#isOurs(node.url)) this.#registry.add(node, { discovered: name })
    }
  }

  /** Adds what is found and not there, and drains what is no longer found. */
  #sync (): void {
    const wanted = new Map<string, string>()
    for (const [key, nodes] of this.#found) {
      const source = key.slice(key.indexOf(' ') + 1)
      for (const [url, node] of nodes) {
        if (wanted.has(url)) continue
        wanted.set(url, source)
        if (this.#leaving.delete(url)) this.#registry.drain(url, false)
        // Those of the configuration, and those that have registered, are not this source's.
        if (this.#registry.get(url) === undefined) this.#registry.add(node, { discovered: source })
      }
    }
    for (const { id } of this.#registry.snapshot().nodes) {
      if (wanted.has(id) || this.#leaving.has(id) || !this.#isOurs(id)) continue
      this.#log.info({ node: id }, 'node is no longer found: it ends what it has')
      this.#leaving.add(id)
      this.#registry.drain(id, true)
    }
    this.#removeIdle()
  }

  #isOurs (id: string): boolean {
    const source = this.#registry.sourceOf(id)
    return source !== undefined && [...this.#found.keys()].some(key => key.slice(key.indexOf(' ') + 1) === source)
  }

  #removeIdle (): void {
    for (const id of this.#leaving) {
      const node = this.#registry.get(id)
      if (node !== undefined && this.#isOurs(id) && node.load.requests > 0) continue
      this.#leaving.delete(id)
      if (node === undefined) continue
      if (this.#isOurs(id)) this.#registry.remove(id)
      // The configuration has it by now.
      else this.#registry.drain(id, false)
    }
    if (this.#leaving.size === 0) {
      clearInterval(this.#timer)
      this.#timer = undefined
    } else this.#timer ??= setInterval(() => { this.#removeIdle() }, LOOK_MS)
  }
}
