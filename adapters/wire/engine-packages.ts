/** Native packages that engines need sooner or later. They are optional peers: a gateway that only routes neither installs nor loads them. */
export const ENGINE_PACKAGES = ['onnxruntime-node', 'zeromq', 'sharp', '@huggingface/jinja', '@huggingface/tokenizers'] as const

/** The script of onnxruntime-node would fetch a CUDA provider; no engine needs the scripts. */
export const INSTALL = `npm install --ignore-scripts ${ENGINE_PACKAGES.join(' ')}`

/** Which of them are not installed, and how to install them: one message at the start instead of one after the other. Loads none. */
export function missingEnginePackages (): string | undefined {
  // A bundle may have the packages in itself.
  if (typeof import.meta.resolve !== 'function') return undefined
  const missing = ENGINE_PACKAGES.filter(name => !installed(name))
  return missing.length === 0 ? undefined : `engines need packages that are not installed (${missing.join(', ')}); a gateway that only routes works without them. Install them with: ${INSTALL}`
}

function installed (name: string): boolean {
  try {
    import.meta.resolve(name)
    return true
  } catch {
    return false
  }
}
