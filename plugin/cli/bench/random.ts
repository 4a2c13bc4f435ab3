/** A seeded generator; each call gives the next number from 0 up to, not including, 1. */
export type Random = () => number

/** The generator of a thing that is named by numbers, such as seed and picture: the same at each run, whatever else was drawn before. */
export function seeded (...names: readonly number[]): Random {
  let state = names.reduce((mixed, name) => mix(mixed ^ mix(name)), 0x9e3779b9)
  // mulberry32
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let next = Math.imul(state ^ (state >>> 15), state | 1)
    next ^= next + Math.imul(next ^ (next >>> 7), next | 61)
    return ((next ^ (next >>> 14)) >>> 0) / 4_294_967_296
  }
}

function mix (value: number): number {
  let mixed = value >>> 0
  mixed = Math.imul(mixed ^ (mixed >>> 16), 0x85ebca6b)
  mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35)
  return (mixed ^ (mixed >>> 16)) >>> 0
}
