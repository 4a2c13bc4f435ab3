import { existsSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

/**
 * The folder of this package's package.json. Compiled code lies at some depth below it (dist/, or a build folder of a
 * test), while data such as the shipped model is never copied there; so the way up is searched, not assumed.
 */
export function packageRoot (): string {
  let dir = dirname(fileURLToPath(import.meta.url))
  for (;;) {
    const file = join(dir, 'package.json')
    if (existsSync(file) && (JSON.parse(readFileSync(file, 'utf8')) as { name?: string }).name === 'fastify-epd') return dir
    const up = dirname(dir)
    if (up === dir) throw new Error('fastify-epd: package.json not found above ' + fileURLToPath(import.meta.url))
    dir = up
  }
}
