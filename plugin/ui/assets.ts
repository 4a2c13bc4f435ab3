import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { extname } from 'node:path'

export interface Asset {
  readonly type: string
  readonly etag: string
  readonly bytes: Buffer
}

const TYPES: Readonly<Record<string, string>> = {
  '.html': 'text/html; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.svg': 'image/svg+xml'
}

/** The page's files, read once because they are few and small. Other paths are not served. */
export function loadAssets (): ReadonlyMap<string, Asset> {
  // The build does not copy the page: this file runs as dist/plugin/ui/assets.js.
  const folder = new URL('../../../plugin/ui/page/', import.meta.url)
  return new Map(readdirSync(folder).flatMap(name => {
    const type = TYPES[extname(name)]
    if (type === undefined) return []
    const bytes = readFileSync(new URL(name, folder))
    const etag = `"${createHash('sha256').update(bytes).digest('base64url').slice(0, 22)}"`
    return [[name, { type, etag, bytes }] as const]
  }))
}
