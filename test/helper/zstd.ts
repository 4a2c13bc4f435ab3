/** Frames of zstd (RFC 8878), which Node.js 20 can't make. */

/** With a window of 1 KiB, and no checksum. */
const HEADER = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x00]
const [RAW, REPEATED] = [0, 1]

function block (type: number, size: number, last: boolean, content: Uint8Array): Buffer {
  const head = (size << 3) | (type << 1) | (last ? 1 : 0)
  return Buffer.from([head & 0xff, (head >> 8) & 0xff, head >> 16, ...content])
}

/** As it is, in blocks of 1 KiB. */
export function storedZstd (bytes: Uint8Array): Buffer {
  const blocks: Buffer[] = []
  for (let at = 0; at < bytes.length; at += 1_024) {
    const part = bytes.subarray(at, at + 1_024)
    blocks.push(block(RAW, part.length, at + 1_024 >= bytes.length, part))
  }
  return Buffer.concat([Buffer.from(HEADER), ...blocks])
}

/** One character, so many KiB of it. */
export function repeatedZstd (character: string, kib: number): Buffer {
  return Buffer.concat([Buffer.from(HEADER), ...Array.from({ length: kib }, (_, i) => block(REPEATED, 1_024, i === kib - 1, Buffer.from(character)))])
}
