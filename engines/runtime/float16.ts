/** IEEE 754 half precision as bits in a Uint16Array: Node before 24 has no Float16Array. */
const f32 = new Float32Array(1)
const u32 = new Uint32Array(f32.buffer)

/** Bits of the half nearest to `value`, ties to even. */
export function toFloat16 (value: number): number {
  f32[0] = value
  const bits = u32[0] as number
  const sign = (bits >>> 16) & 0x8000
  const magnitude = bits & 0x7fffffff
  if (magnitude > 0x7f800000) return sign | 0x7e00
  if (magnitude >= 0x477ff000) return sign | 0x7c00
  if (magnitude >= 0x38800000) {
    const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1)
    return sign | ((rounded - 0x38000000) >>> 13)
  }
  // Subnormal: a multiple of 2^-24, rounded to even.
  const scaled = Math.abs(f32[0] as number) * 2 ** 24
  const floor = Math.floor(scaled)
  const rest = scaled - floor
  return sign | (rest > 0.5 || (rest === 0.5 && (floor & 1) === 1) ? floor + 1 : floor)
}

export function fromFloat16 (bits: number): number {
  const sign = (bits & 0x8000) !== 0 ? -1 : 1
  const exponent = (bits >>> 10) & 0x1f
  const fraction = bits & 0x3ff
  if (exponent === 0x1f) return fraction === 0 ? sign * Infinity : NaN
  return exponent === 0 ? sign * fraction * 2 ** -24 : sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
}
