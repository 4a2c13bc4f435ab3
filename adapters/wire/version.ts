import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

interface Package { readonly root: string, readonly version: string }

/** Walks up, as compiled code may lie at any depth below the package. */
function findPackage (): Package {
  for (let root = dirname(fileURLToPath(import.meta.url)); ; root = dirname(root)) {
    try {
      const found = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { name: string, version: string }
      if (found.name === 'fastify-epd') return { root, version: found.version }
    } catch (err) {
      if (root === dirname(root)) throw err
    }
  }
}

const PACKAGE = findPackage()

/** The folder of package.json, where data lies that is never compiled (sample pictures, the shipped model). */
export const PACKAGE_ROOT: string = PACKAGE.root
/** This package's version: the tracer's name tag, `user-agent`, `--version`. */
export const VERSION: string = PACKAGE.version
