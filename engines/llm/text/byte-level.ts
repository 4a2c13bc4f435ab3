/** GPT-2's byte-level alphabet: every byte as one printable character. Byte-level tokens are spelled in it. */
function alphabet (): Map<string, number> {
  const bytes = new Map<string, number>()
  let next = 256
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174)
    bytes.set(String.fromCharCode(printable ? byte : next++), byte)
  }
  return bytes
}

const BYTE_OF = alphabet()

/** The bytes a byte-level token stands for; undefined when it is not spelled in that alphabet. */
export function byteLevelBytes (token: string): Uint8Array | undefined {
  const bytes = new Uint8Array(token.length)
  for (let i = 0; i < token.length; i++) {
    const byte = BYTE_OF.get(token[i] as string)
    if (byte === undefined) return undefined
    bytes[i] = byte
  }
  return bytes
}
