import { randomBytes } from 'node:crypto'

const POOL_BYTES = 4_096
let pool = ''
let drawn = 0

/** So many random hex digits. Randomness, and hex, are dear by the call, not by the byte. */
function randomHex (digits: number): string {
  if (drawn + digits > pool.length) {
    pool = randomBytes(POOL_BYTES).toString('hex')
    drawn = 0
  }
  drawn += digits
  return pool.slice(drawn - digits, drawn)
}

/** All zeros would be no valid id; it is as likely as guessing one. */
export function randomTraceId (): string {
  return randomHex(32)
}

export function randomSpanId (): string {
  return randomHex(16)
}
