/**
 * Native packages that only engines need. They are optional peers, so a gateway that only routes neither installs nor
 * loads them.
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

/** Everything an engine opens sooner or later, onnxruntime-node (engines/runtime loads it) included. */
const NEEDED = ['onnxruntime-node', ...Object.keys(PURPOSE)]
/** The script of onnxruntime-node would fetch a CUDA provider; no engine needs the scripts. */
const INSTALL = `npm install --ignore-scripts ${NEEDED.join(' ')}`

/** Error for a package that can't be loaded; `cause` has the loader's reason. */
export function missingPackage (name: string, purpose: string, cause: unknown): Error {
  const reason = cause instanceof Error ? cause.message.split('\n')[0] : String(cause)
  return new Error(`engines need the package ${name} (${purpose}), which can't be loaded: ${reason}. Install what engines need with: ${INSTALL}`, { cause })
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
