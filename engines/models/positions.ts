import type { MediaSpan, PlacedItem, Positions } from './family.ts'

/** 0, 1, 2, ...: positions of every model without M-RoPE. */
export function sequentialPositions (length: number): Positions {
  return { axes: 1, values: Int32Array.from({ length }, (_, i) => i), next: length }
}

/**
 * M-RoPE: text counts on all three axes alike; the tokens of a picture, whose grid is [1, height, width] in patches, keep
 * one temporal position and count rows and columns of `merge` x `merge` patches. What follows goes on after the longer side.
 */
export function mropePositions (length: number, spans: readonly MediaSpan[], items: readonly PlacedItem[], merge: number): Positions {
  const values = new Int32Array(3 * length)
  let at = 0
  let next = 0
  const put = (temporal: number, height: number, width: number): void => {
    values[at] = temporal
    values[length + at] = height
    values[2 * length + at] = width
    at++
  }
  const text = (tokens: number): void => { for (let i = 0; i < tokens; i++, next++) put(next, next, next) }
  for (const { item, start } of spans) {
    text(start - at)
    const [, height = 0, width = 0] = items[item]?.grid ?? []
    const rows = height / merge
    const columns = width / merge
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) put(next, next + row, next + column)
    next += Math.max(rows, columns)
  }
  text(length - at)
  return { axes: 3, values, next }
}
