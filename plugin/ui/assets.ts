import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { extname, join } from 'node:path'
import { PACKAGE_ROOT } from '../version.ts'

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

/** The page's files, read once: they are few and small, and what is not among them can't be asked for. */
export function loadAssets (): ReadonlyMap<string, Asset> {
  const folder = join(PACKAGE_ROOT, 'plugin', 'ui', 'page')
  return new Map(readdirSync(folder).flatMap(name => {
    const type = TYPES[extname(name)]
    if (type === undefined) return []
    const bytes = readFileSync(join(folder, name))
    const etag = `"${createHash('sha256').update(bytes).digest('base64url').slice(0, 22)}"`
    return [[name, { type, etag, bytes }] as const]
  }))
}
