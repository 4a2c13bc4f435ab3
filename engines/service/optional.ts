import { createRequire } from 'node:module'

/**
 * Native packages that only engines need. They are optional peers, so a gateway that only routes neither installs nor
 * loads them.
 */
interface Optional {
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

/** Everything an engine opens sooner or later. */
const NEEDED = Object.keys(PURPOSE)
/** The script of onnxruntime-node would fetch a CUDA provider; no engine needs the scripts. */
const INSTALL = `npm install --ignore-scripts ${NEEDED.join(' ')}`

const require = createRequire(import.meta.url)

/** Error for a package that can't be loaded; `cause` has the loader's reason. */
export function missingPackage (name: keyof Optional, cause: unknown): Error {
  const reason = cause instanceof Error ? cause.message.split('\n')[0] : String(cause)
  return new Error(`engines need the package ${name} (${PURPOSE[name]}), which can't be loaded: ${reason}. Install what engines need with: ${INSTALL}`, { cause })
}

/**
 * Checks that all optional packages are installed, without loading them: one message at the start instead of one after the other.
 * @throws Error naming the missing packages and the command that installs them
 */
export function assertInstalled (): void {
  const missing = NEEDED.filter(name => !installed(name))
  if (missing.length > 0) throw new Error(`engines need packages that are not installed (${missing.join(', ')}); a gateway that only routes works without them. Install them with: ${INSTALL}`)
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
