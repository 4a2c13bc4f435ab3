import { createRequire } from 'node:module'
import { INSTALL, missingEnginePackages, type ENGINE_PACKAGES } from '../../adapters/wire/engine-packages.ts'

interface Optional extends Record<typeof ENGINE_PACKAGES[number], unknown> {
  /** Only engines/runtime knows it. */
  'onnxruntime-node': unknown
  zeromq: typeof import('zeromq')
  sharp: typeof import('sharp').default
  '@huggingface/jinja': typeof import('@huggingface/jinja')
  '@huggingface/tokenizers': typeof import('@huggingface/tokenizers')
}

/** What each is for, for the message. */
const PURPOSE: Record<keyof Optional, string> = {
  'onnxruntime-node': 'running models',
  zeromq: 'the P2P link between engines',
  sharp: 'decoding pictures',
  '@huggingface/jinja': 'chat templates',
  '@huggingface/tokenizers': 'tokenizers'
}

const require = createRequire(import.meta.url)

/** Error for a package that can't be loaded; `cause` has the loader's reason. */
export function missingPackage (name: keyof Optional, cause: unknown): Error {
  const reason = cause instanceof Error ? cause.message.split('\n')[0] : String(cause)
  return new Error(`engines need the package ${name} (${PURPOSE[name]}), which can't be loaded: ${reason}. Install what engines need with: ${INSTALL}`, { cause })
}

/** @throws Error naming the packages that are not installed and the command that installs them */
export function assertInstalled (): void {
  const missing = missingEnginePackages()
  if (missing !== undefined) throw new Error(missing)
}

/**
 * Loads an optional package of ES modules.
 * @throws Error naming the package and the command that installs it.
 */
export async function loadOptional<K extends '@huggingface/jinja' | '@huggingface/tokenizers'> (name: K): Promise<Optional[K]> {
  try {
    return await import(name) as Optional[K]
  } catch (cause) {
    throw missingPackage(name, cause)
  }
}

/**
 * The same for a CommonJS package. `import` would look for names in all its files before it runs them, by a parser
 * written in JavaScript: sharp costs a thread 160 ms of CPU so, and 85 this way.
 * @throws Error naming the package and the command that installs it.
 */
export function requireOptional<K extends 'sharp' | 'onnxruntime-node'> (name: K): Optional[K] {
  try {
    return require(name) as Optional[K]
  } catch (cause) {
    throw missingPackage(name, cause)
  }
}
