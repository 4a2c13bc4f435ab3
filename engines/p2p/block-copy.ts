import { createRequire } from 'node:module'
import { crc32 as ownCrc32 } from 'node:zlib'
import { allFinite } from './finite.ts'
import type { Dtype } from './types.ts'

const crc32 = fastestCrc32()

/**
 * The package computes the same, several times as fast, where it is installed and runs. It is CommonJS: `import` would look
 * for the names that it exports first, 50 ms of CPU in each transfer worker.
 */
function fastestCrc32 (): (bytes: Uint8Array, before?: number) => number {
  try {
    return (createRequire(import.meta.url)('@node-rs/crc32') as typeof import('@node-rs/crc32')).crc32
  } catch {
    return ownCrc32
  }
}

/** Copy and checksum go over pieces that stay in a core's L2 cache between the two: memory is read once, not twice. */
const PIECE_BYTES = 128 << 10

/** The memory of a pool, as a transfer worker sees it. */
export interface BlockMemory {
  bytes: Uint8Array
  blockBytes: number
  numBlocks: number
  dtype: Dtype
}

/** Calls `visit` with the memory of bytes [offset, offset + length) of a list of blocks, as few and at most L2-sized pieces. */
function eachPiece (memory: BlockMemory, blocks: readonly number[], offset: number, length: number, visit: (piece: Uint8Array, at: number) => void): void {
  const { bytes, blockBytes } = memory
  let at = 0
  while (at < length) {
    const index = Math.floor((offset + at) / blockBytes)
    const within = (offset + at) % blockBytes
    const start = (blocks[index] as number) * blockBytes + within
    // Neighbouring blocks are one run: pools hand them out that way while they are not fragmented.
    let run = blockBytes - within
    for (let next = index + 1; run < PIECE_BYTES && blocks[next] === (blocks[next - 1] as number) + 1; next++) run += blockBytes
    const size = Math.min(run, PIECE_BYTES, length - at)
    visit(bytes.subarray(start, start + size), at)
    at += size
  }
}

/** Copies bytes out of blocks into `target` and returns their crc32. */
export function gather (memory: BlockMemory, blocks: readonly number[], offset: number, target: Uint8Array): number {
  let crc = 0
  eachPiece(memory, blocks, offset, target.length, (piece, at) => {
    target.set(piece, at)
    crc = crc32(target.subarray(at, at + piece.length), crc)
  })
  return crc
}

/** Copies `source` into blocks. Returns its crc32, computed from `source`, and whether the numbers that were written are all finite. */
export function scatter (memory: BlockMemory, blocks: readonly number[], offset: number, source: Uint8Array): { crc: number, finite: boolean } {
  let crc = 0
  let finite = true
  eachPiece(memory, blocks, offset, source.length, (piece, at) => {
    const part = source.subarray(at, at + piece.length)
    crc = crc32(part, crc)
    piece.set(part)
    finite &&= allFinite(piece, memory.dtype)
  })
  return { crc, finite }
}
