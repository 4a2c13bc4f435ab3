/** Files that a configuration names: secrets, certificates, the state file. */
import { readFileSync, statSync } from 'node:fs'

/** A secret, a certificate or a state file has a few KiB. */
const MAX_BYTES = 16 * 1_048_576

/**
 * They are read between requests, also at a reload: a pipe without a writer, a device or a large file would hold all of them up.
 * @throws what a read throws, or why it was not tried
 */
export function readNamedFile (path: string): Buffer {
  const stats = statSync(path)
  // A read names a folder by itself.
  if (!stats.isFile() && !stats.isDirectory()) throw new Error('it is no file')
  if (stats.size > MAX_BYTES) throw new Error(`it has more than ${MAX_BYTES / 1_048_576} MiB`)
  return readFileSync(path)
}

/** In few words. */
export function readFailure (err: unknown): string {
  const { code, message } = err as NodeJS.ErrnoException
  return code ?? message
}
