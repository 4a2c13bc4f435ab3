import { randomBytes } from 'node:crypto'

const POOL_BYTES = 4_096
let pool = Buffer.alloc(0)
let drawn = 0

/**
 * So many random hex digits. Randomness, and hex, are dear by the call, not by the byte; and a slice of a long string
 * is slower to read than a string of its own, which ids are, again and again.
 */
function randomHex (digits: number): string {
  if (drawn + digits > pool.length) {
    pool = Buffer.from(randomBytes(POOL_BYTES).toString('hex'), 'latin1')
    drawn = 0
  }
  drawn += digits
  return pool.toString('latin1', drawn - digits, drawn)
}

/** All zeros would be no valid id; it is as likely as guessing one. */
export function randomTraceId (): string {
  return randomHex(32)
}

export function randomSpanId (): string {
  return randomHex(16)
}

const COUNTED_DIGITS = 4
const counted: string[] = []

/** For ids that differ in their end only, which within a trace is enough. */
export function randomIdPrefix (): string {
  return randomHex(16 - COUNTED_DIGITS)
}

/** @param n at most 65,535 */
export function spanIdOf (prefix: string, n: number): string {
  // Numbers are written out once for all requests.
  counted[n] ??= n.toString(16).padStart(COUNTED_DIGITS, '0')
  return prefix + counted[n]
}
