import type { AdapterNode } from '../adapter.ts'

/** Where requests to a node go. */
export interface Target {
  readonly origin: string
  /** Path below the origin, without a slash at its end. */
  readonly prefix: string
}

const targets = new Map<string, Target>()
const LIMIT = 1024

function parse (url: string): Target {
  const { origin, pathname } = new URL(url)
  return { origin, prefix: pathname.replace(/\/+$/, '') }
}

/** Splits a node's base URL, once per URL. */
export function targetOf (node: AdapterNode): Target {
  let target = targets.get(node.url)
  if (target === undefined) {
    target = parse(node.url)
    if (targets.size >= LIMIT) targets.clear()
    targets.set(node.url, target)
  }
  return target
}

/** Joins a node's base path with a path of the API. A base URL that already ends in `/v1` does not get a second one. */
export function joinPath (target: Target, path: string): string {
  if (target.prefix === '') return path
  return target.prefix.endsWith('/v1') && path.startsWith('/v1/') ? target.prefix + path.slice(3) : target.prefix + path
}
