import type { BlockPool } from '../../cache/block-pool.ts'
import type { Elements } from '../../llm/runner/elements.ts'

/** Copies the rows that begin in `blocks` of a feature pool to a tensor of their own, which `into` is as long as. */
export function copyOut (pool: BlockPool, blocks: readonly number[], into: Elements): void {
  const bytes = new Uint8Array(into.buffer, into.byteOffset, into.byteLength)
  for (let at = 0, b = 0; at < bytes.length; at += pool.blockBytes, b++) {
    bytes.set(pool.bytes(blocks[b] as number).subarray(0, bytes.length - at), at)
  }
}
