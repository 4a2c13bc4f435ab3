import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { packageRoot } from './package-root.ts'

/**
 * Native packages only engines need. They are optional dependencies, so that a gateway which only routes neither
 * installs nor loads them; a missing one must say what to do about it.
 */
interface Optional {
  zeromq: typeof import('zeromq')
  sharp: typeof import('sharp')
  '@huggingface/jinja': typeof import('@huggingface/jinja')
  '@huggingface/tokenizers': typeof import('@huggingface/tokenizers')
}

/** What each is for, for the message. */
const PURPOSE: Record<keyof Optional, string> = {
  zeromq: 'the P2P link between engines',
  sharp: 'decoding pictures',
  '@huggingface/jinja': 'chat templates',
  '@huggingface/tokenizers': 'tokenizers'
}

/** Error for a package that can't be loaded; `cause` has what the loader said. */
export function missingPackage (name: string, purpose: string, cause: unknown): Error {
  const reason = cause instanceof Error ? cause.message.split('\n')[0] : String(cause)
  return new Error(`engines need the package ${name} (${purpose}), which can't be loaded: ${reason}. Install it with: npm i --ignore-scripts ${name}`, { cause })
}

/** Everything an engine opens sooner or later, onnxruntime-node (engines/runtime loads it) included. */
const NEEDED = ['onnxruntime-node', ...Object.keys(PURPOSE)]

/**
 * Checks, without loading anything, that all optional packages are there: better one message at the start than one after the other.
 * @throws Error that names those that are missing and the command that installs them, in the versions this package was tested with
 */
export function assertInstalled (): void {
  const missing = NEEDED.filter(name => !installed(name))
  if (missing.length === 0) return
  const { optionalDependencies } = JSON.parse(readFileSync(join(packageRoot(), 'package.json'), 'utf8')) as { optionalDependencies: Record<string, string> }
  const wanted = missing.map(name => `${name}@${optionalDependencies[name] ?? 'latest'}`)
  throw new Error(`engines need packages that are not installed; a gateway that only routes does without them. Install them with: npm i --ignore-scripts ${wanted.join(' ')}`)
}

function installed (name: string): boolean {
  try {
    import.meta.resolve(name)
    return true
  } catch {
    return false
  }
}

/**
 * Loads an optional package.
 * @throws Error naming the package and the command that installs it.
 */
export async function loadOptional<K extends keyof Optional> (name: K): Promise<Optional[K]> {
  try {
    return await import(name) as Optional[K]
  } catch (cause) {
    throw missingPackage(name, PURPOSE[name], cause)
  }
}
