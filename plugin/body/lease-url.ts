import { LEASE_SCHEME } from '../../adapters/wire/results.ts'

/**
 * Will an engine read this JSON string (without quotes) as a URL of an encoder's result? Sees through JSON escapes,
 * upper case, and the white space and control characters that URL parsers drop.
 */
export function isLeaseUrl (bytes: Buffer, start: number, end: number): boolean {
  let matched = 0
  for (let pos = start; pos < end && matched < LEASE_SCHEME.length;) {
    let code = bytes[pos]!
    if (code === 0x5c) {
      const step = bytes[pos + 1] === 0x75 ? 6 : 2
      code = (JSON.parse(`"${bytes.toString('latin1', pos, pos + step)}"`) as string).charCodeAt(0)
      pos += step
    } else if (code >= 0x80) {
      const step = code >= 0xf0 ? 4 : code >= 0xe0 ? 3 : 2
      code = bytes.toString('utf8', pos, pos + step).charCodeAt(0)
      pos += step
    } else pos++
    if (isIgnored(code)) continue
    if (String.fromCharCode(code).toLowerCase() !== LEASE_SCHEME[matched]) return false
    matched++
  }
  return matched === LEASE_SCHEME.length
}

/** Controls, white space of any kind, zero-width characters and the byte order mark. */
function isIgnored (code: number): boolean {
  return code <= 0x20 || (code >= 0x7f && code <= 0xa0) || (code >= 0x2000 && code <= 0x200f) || code === 0x2028 || code === 0x2029 ||
    code === 0x202f || code === 0x205f || code === 0x2060 || code === 0x3000 || code === 0xfeff || code === 0x1680 || code === 0xad
}
