import type { Positions } from './family.ts'

/** 0, 1, 2, ...: positions of every model without M-RoPE. */
export function sequentialPositions (length: number): Positions {
  return { axes: 1, values: Int32Array.from({ length }, (_, i) => i), next: length }
}
