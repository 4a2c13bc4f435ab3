/** Other options for a gateway that runs: what differs is applied, requests in flight go on. */
import { isDeepStrictEqual } from 'node:util'
import type { Gateway } from './gateway.ts'
import type { ResolvedOptions } from './options/index.ts'
import { MediaCheck } from './pipeline/index.ts'
import type { NodeChanges } from './registry/index.ts'

export interface Reloaded {
  /** Options that have other values from now on, by their paths. */
  readonly changed: readonly string[]
  readonly nodes: NodeChanges
  /** Options that differ, but count from a start on: the old values stay in force. */
  readonly restart: readonly string[]
}

type Name = keyof ResolvedOptions

/** What requests read anew, as a whole or by member. */
const LIVE: Readonly<Partial<Record<Name, true | readonly string[]>>> = {
  bypass: true,
  overlap: true,
  routing: true,
  retries: true,
  sse: true,
  media: true,
  admission: true,
  aliases: true,
  apiKeys: true,
  keys: true,
  adminKey: true,
  allowedNetworks: true,
  headers: true,
  forwardHeaders: true,
  tenant: true,
  timeouts: ['encode', 'prefill', 'firstByte', 'answer', 'idle', 'total', 'grace'],
  limits: ['items']
}

export function reload (gateway: Gateway, next: ResolvedOptions): Reloaded {
  const old = gateway.options
  const merged: Record<string, unknown> = { ...old, nodes: next.nodes }
  const changed: string[] = []
  const restart: string[] = []
  for (const name of Object.keys({ ...old, ...next }).sort() as Name[]) {
    if (name === 'nodes') continue
    for (const [path, member] of differences(name, old[name], next[name])) {
      const live = LIVE[name]
      if (live !== true && (member === undefined || live?.includes(member) !== true)) {
        restart.push(path)
        continue
      }
      changed.push(path)
      merged[name] = member === undefined || live === true ? next[name] : { ...merged[name] as object, [member]: (next[name] as unknown as Record<string, unknown>)[member] }
    }
  }
  gateway.options = merged as unknown as ResolvedOptions
  if (changed.some(path => path.startsWith('admission.'))) gateway.admission.configure(next.admission)
  if (changed.some(path => path.startsWith('media.'))) {
    // Requests that it looks at go on with the old one.
    gateway.requests.background(gateway.mediaCheck.close())
    gateway.mediaCheck = new MediaCheck(next.media)
  }
  const nodes = gateway.registry.configure(next.nodes)
  gateway.log.info({ changed, nodes, restart }, 'configuration read again')
  return { changed, nodes, restart }
}

/** Paths of what differs: of a section, its members. */
function differences (name: string, old: unknown, next: unknown): ReadonlyArray<readonly [path: string, member?: string]> {
  if (isDeepStrictEqual(old, next)) return []
  if (!isSection(old) || !isSection(next)) return [[name]]
  return Object.keys({ ...old, ...next }).filter(member => !isDeepStrictEqual(old[member], next[member])).map(member => [`${name}.${member}`, member])
}

function isSection (value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
