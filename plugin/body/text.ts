/** Longest string that is ever decoded from a body in one piece, in bytes; all that are read by name are far shorter. */
const MAX_DECODED = 64 * 1024

/** The JavaScript value of a JSON string's bytes (without quotes); undefined when it is unreasonably long. */
export function decodeString (bytes: Buffer, start: number, end: number, escaped: boolean): string | undefined {
  if (end - start > MAX_DECODED) return undefined
  return escaped ? JSON.parse(bytes.toString('utf8', start - 1, end + 1)) as string : bytes.toString('utf8', start, end)
}

/**
 * Does this string, once read by whoever reads it, begin with `prefix` (lower case)? Sees through JSON escapes, upper
 * case, and the white space and control characters that URL parsers drop.
 */
export function looksLike (bytes: Buffer, start: number, end: number, prefix: string): boolean {
  let matched = 0
  for (let pos = start; pos < end && matched < prefix.length;) {
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
    if (String.fromCharCode(code).toLowerCase() !== prefix[matched]) return false
    matched++
  }
  return matched === prefix.length
}

/** Controls, white space of any kind, zero-width characters and the byte order mark. */
function isIgnored (code: number): boolean {
  return code <= 0x20 || (code >= 0x7f && code <= 0xa0) || (code >= 0x2000 && code <= 0x200f) || code === 0x2028 || code === 0x2029 ||
    code === 0x202f || code === 0x205f || code === 0x2060 || code === 0x3000 || code === 0xfeff || code === 0x1680 || code === 0xad
}
