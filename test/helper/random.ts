/** Seeded generators, so that a failing random test can be repeated by its seed. */

/** mulberry32: each call returns the next integer from 0 to 2^32 - 1. */
export function mulberry32 (seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return (mixed ^ (mixed >>> 14)) >>> 0
  }
}

/** Each call returns the next integer from 0 to `below - 1`. */
export function seeded (seed: number): (below: number) => number {
  const next = mulberry32(seed)
  return below => next() % below
}
