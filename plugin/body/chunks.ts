/** Slices shorter than this are copied together: a write call costs more than copying them, in bytes. */
const SMALL = 4096
/** Bodies up to this size become one buffer, in bytes. */
const ONE_BUFFER = 64 * 1024

/** Total length of chunks, in bytes: the content-length of a spliced body. */
export function byteLength (chunks: readonly Buffer[]): number {
  let total = 0
  for (const chunk of chunks) total += chunk.length
  return total
}

/** Joins slices that lie side by side and copies neighbouring small ones together; big ones stay slices of the original. */
export function compact (chunks: readonly Buffer[]): Buffer[] {
  if (chunks.length <= 1) return [...chunks]
  if (byteLength(chunks) <= ONE_BUFFER) return [Buffer.concat(chunks)]
  const result: Buffer[] = []
  let run: Buffer[] = []
  const flush = (): void => {
    if (run.length > 0) result.push(run.length === 1 ? run[0]! : Buffer.concat(run))
    run = []
  }
  for (const chunk of joinAdjacent(chunks)) {
    if (chunk.length < SMALL) run.push(chunk)
    else {
      flush()
      result.push(chunk)
    }
  }
  flush()
  return result
}

function joinAdjacent (chunks: readonly Buffer[]): Buffer[] {
  const result: Buffer[] = []
  for (const chunk of chunks) {
    const last = result.at(-1)
    if (last !== undefined && last.buffer === chunk.buffer && last.byteOffset + last.length === chunk.byteOffset) {
      result[result.length - 1] = Buffer.from(last.buffer, last.byteOffset, last.length + chunk.length)
    } else result.push(chunk)
  }
  return result
}
