/**
 * Pods that are ready, by list and watch. The informer of the package is not used: an event without metadata ends the process,
 * and a server that ends watches at once is asked again without a pause.
 */
import type { KubeConfig, V1Pod } from '@kubernetes/client-node'
import { isIP } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import { ROLE_TO_WIRE, type Log, type Role } from '../../adapters/adapter.ts'
import type { PodOptions } from '../options/index.ts'
import { ApiServer, RefusedError } from './api-server.ts'
import type { Found, Give } from './found.ts'

/** Milliseconds. */
const TIMES = {
  /** For a list to be there, and for a watch to begin. */
  answer: 30_000,
  /** The server ends a watch then by itself; `answer` later it has not, and the connection is broken. */
  watch: 300_000,
  /** What was over sooner is followed by a pause, which doubles until something is heard. */
  steady: 10_000,
  pause: 1_000,
  maxPause: 30_000
}

/** An optional peer: a name that a bundler can't resolve stays out of the bundle. */
const CLIENT: string = '@kubernetes/client-node'

/** @returns ends it */
export async function followPods (options: PodOptions, log: Log, give: Give, times = TIMES): Promise<() => void> {
  const { KubeConfig: Config } = await (import(CLIENT) as Promise<typeof import('@kubernetes/client-node')>)
  const config = new Config()
  if (options.kubeconfig === undefined) config.loadFromDefault()
  else readConfig(config, options.kubeconfig)
  const namespace = options.namespace ?? config.getContextObject(config.getCurrentContext())?.namespace ?? 'default'
  const ending = new AbortController()
  const server = new ApiServer(config, `/api/v1/namespaces/${encodeURIComponent(namespace)}/pods`, ending.signal, times.answer)
  follow(new Pods(server, options, give), ending.signal, times, reason => {
    log.warn({ selector: options.selector, namespace, reason }, 'pods could not be watched: the nodes stay that were found')
  })
  return () => { ending.abort() }
}

function readConfig (config: KubeConfig, file: string): void {
  try {
    config.loadFromFile(file)
  } catch (err) {
    throw new Error(`discover: can't use the kubeconfig ${file} (${(err as Error).message})`, { cause: err })
  }
}

/** A watch that ends is resumed where it was; after whatever failed all is listed again. */
async function follow (pods: Pods, ending: AbortSignal, times: typeof TIMES, failed: (reason: string) => void): Promise<void> {
  let pause = times.pause
  while (!ending.aborted) {
    const began = performance.now()
    try {
      await pods.list()
      await pods.watch(times)
    } catch (err) {
      if (ending.aborted) return
      pods.forget()
      failed((err as Error).message)
    }
    const isSteady = performance.now() - began >= times.steady
    if (isSteady || pods.heard) pause = times.pause
    if (isSteady) continue
    await delay(pause, undefined, { signal: ending }).catch(() => {})
    pause = Math.min(2 * pause, times.maxPause)
  }
}

class Pods {
  readonly #server: ApiServer
  readonly #options: PodOptions
  readonly #give: Give
  /** By the name of the pod. */
  readonly #nodes = new Map<string, Found>()
  #given: readonly Found[] | undefined
  /** Of the server's, that is known. Undefined: list. */
  #version: string | undefined
  /** Something came since the last watch began. */
  heard = false

  constructor (server: ApiServer, options: PodOptions, give: Give) {
    this.#server = server
    this.#options = options
    this.#give = give
  }

  forget (): void {
    this.#version = undefined
  }

  async list (): Promise<void> {
    if (this.#version !== undefined) return
    const list = await this.#server.get({ labelSelector: this.#options.selector })
    // The page of a proxy is no list without pods.
    if (!isObject(list) || list.kind !== 'PodList' || !Array.isArray(list.items ?? [])) throw new Error('the API server answers no list of pods')
    const version = versionOf(list)
    this.#nodes.clear()
    for (const pod of (list.items ?? []) as unknown[]) this.#take(pod)
    this.#version = version
    this.#tell()
  }

  async watch ({ watch, answer }: typeof TIMES): Promise<void> {
    this.heard = false
    const query = { watch: 'true', allowWatchBookmarks: 'true', labelSelector: this.#options.selector, resourceVersion: this.#version!, timeoutSeconds: String(Math.ceil(watch / 1_000)) }
    try {
      for await (const lines of this.#server.lines(query, watch + answer)) {
        for (const line of lines) this.#event(JSON.parse(line))
        this.#tell()
      }
    } catch (err) {
      if (!(err instanceof RefusedError && err.status === 410)) throw err
      // The server no longer knows what came since: nothing has failed.
      this.forget()
    }
  }

  #event (event: unknown): void {
    if (!isObject(event) || !isObject(event.object)) throw new Error('the API server sends what is no event')
    const { type, object } = event
    if (type === 'ERROR') throw new RefusedError(Number(object.code), String(object.message))
    if (type === 'DELETED') this.#nodes.delete(nameOf(object))
    else if (type !== 'BOOKMARK') this.#take(object)
    this.#version = versionOf(object)
    this.heard = true
  }

  #take (pod: unknown): void {
    const { port, roleLabel } = this.#options
    const name = nameOf(pod)
    const host = readyAddress(name, pod as V1Pod)
    if (host === undefined) this.#nodes.delete(name)
    else this.#nodes.set(name, { host, port, ...roleOf(pod as V1Pod, roleLabel) })
  }

  #tell (): void {
    const found = [...this.#nodes.values()]
    if (!isDeepStrictEqual(found, this.#given)) this.#give(this.#given = found)
  }
}

interface Json { readonly [key: string]: unknown }

function isObject (value: unknown): value is Json {
  return typeof value === 'object' && value !== null
}

function metadataOf (value: unknown): { readonly name?: string, readonly resourceVersion?: string } {
  if (!isObject(value) || !isObject(value.metadata)) throw new Error('the API server sends an object without metadata')
  return value.metadata
}

function nameOf (value: unknown): string {
  const { name } = metadataOf(value)
  if (typeof name !== 'string') throw new Error('the API server sends a pod without a name')
  return name
}

function versionOf (value: unknown): string {
  const { resourceVersion } = metadataOf(value)
  if (typeof resourceVersion !== 'string' || resourceVersion === '') throw new Error('the API server sends an object without a resourceVersion')
  return resourceVersion
}

/** A pod that ends is not ready, whatever its conditions say. */
function readyAddress (name: string, { metadata, status }: V1Pod): string | undefined {
  if (!Array.isArray(status?.conditions ?? [])) throw new Error(`the API server sends conditions of the pod ${name} that are no list`)
  const isReady = metadata?.deletionTimestamp === undefined && status?.conditions?.some(condition => condition?.type === 'Ready' && condition.status === 'True')
  return isReady === true && isIP(status?.podIP ?? '') !== 0 ? status!.podIP : undefined
}

function roleOf ({ metadata }: V1Pod, label: string | undefined): { readonly role?: Role } {
  const role = label === undefined ? undefined : metadata?.labels?.[label]
  return role !== undefined && Object.hasOwn(ROLE_TO_WIRE, role) ? { role: role as Role } : {}
}
