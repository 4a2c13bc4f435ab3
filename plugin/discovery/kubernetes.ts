/** Pods that are ready, by list and watch. The client resumes a watch where it ended, and lists again when the server has forgotten (410). */
import type { CoreV1Api, KubeConfig, V1Pod, V1PodList } from '@kubernetes/client-node'
import { ROLE_TO_WIRE, type Log, type Role } from '../../adapters/adapter.ts'
import type { PodOptions } from '../options/index.ts'
import type { Give } from './found.ts'

/** After a watch that failed; it doubles. Milliseconds. */
const [RETRY_MS, MAX_RETRY_MS] = [1_000, 30_000]

/** An optional peer: a name that a bundler can't resolve stays out of the bundle. */
const CLIENT: string = '@kubernetes/client-node'

export async function followPods ({ selector, namespace, port, roleLabel, kubeconfig }: PodOptions, log: Log, give: Give): Promise<() => void> {
  const { CoreV1Api: Api, KubeConfig: Config, makeInformer } = await (import(CLIENT) as Promise<typeof import('@kubernetes/client-node')>)
  const config = new Config()
  if (kubeconfig === undefined) config.loadFromDefault()
  else readConfig(config, kubeconfig)
  const space = namespace ?? config.getContextObject(config.getCurrentContext())?.namespace ?? 'default'
  const api: CoreV1Api = config.makeApiClient(Api)
  const list = async (): Promise<V1PodList> => await api.listNamespacedPod({ namespace: space, labelSelector: selector })
  const informer = makeInformer<V1Pod>(config, `/api/v1/namespaces/${encodeURIComponent(space)}/pods`, list, selector)

  let ended = false
  let retry = RETRY_MS
  let timer: NodeJS.Timeout | undefined
  let soon: NodeJS.Immediate | undefined
  const changed = (): void => {
    retry = RETRY_MS
    // A list brings many at once.
    soon ??= setImmediate(() => {
      soon = undefined
      if (!ended) give(informer.list().filter(isReady).map(pod => ({ host: pod.status!.podIP!, port, ...roleOf(pod, roleLabel) })))
    })
  }
  for (const event of ['add', 'update', 'delete'] as const) informer.on(event, changed)
  const again = (err: unknown): void => {
    if (ended) return
    log.warn({ selector, namespace: space, reason: (err as Error).message }, 'pods could not be watched: the nodes stay that were found')
    clearTimeout(timer)
    timer = setTimeout(start, retry)
    retry = Math.min(2 * retry, MAX_RETRY_MS)
  }
  const start = (): void => { informer.start().catch(again) }
  informer.on('error', again)
  start()
  return () => {
    ended = true
    clearTimeout(timer)
    clearImmediate(soon)
    informer.stop().catch(() => {})
  }
}

function readConfig (config: KubeConfig, file: string): void {
  try {
    config.loadFromFile(file)
  } catch (err) {
    throw new Error(`discover: can't use the kubeconfig ${file} (${(err as Error).message})`, { cause: err })
  }
}

/** A pod that ends is not ready, whatever its conditions say. */
function isReady ({ metadata, status }: V1Pod): boolean {
  return metadata?.deletionTimestamp === undefined && status?.podIP !== undefined && status.conditions?.some(({ type, status }) => type === 'Ready' && status === 'True') === true
}

function roleOf ({ metadata }: V1Pod, label: string | undefined): { readonly role?: Role } {
  const role = label === undefined ? undefined : metadata?.labels?.[label]
  return role !== undefined && Object.hasOwn(ROLE_TO_WIRE, role) ? { role: role as Role } : {}
}
