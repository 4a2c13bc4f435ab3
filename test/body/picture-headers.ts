/** The first bytes of pictures of given sizes: enough for a header, not for a decoder. */
export function png (width: number, height: number): Buffer {
  const bytes = Buffer.alloc(64)
  bytes.write('\x89PNG\r\n\x1a\n\0\0\0\rIHDR', 'latin1')
  bytes.writeUInt32BE(width, 16)
  bytes.writeUInt32BE(height, 20)
  return bytes
}

export function gif (width: number, height: number): Buffer {
  const bytes = Buffer.alloc(64)
  bytes.write('GIF89a', 'latin1')
  bytes.writeUInt16LE(width, 6)
  bytes.writeUInt16LE(height, 8)
  return bytes
}

/** `padding` bytes of application segments come before the frame header, as from cameras. */
export function jpeg (width: number, height: number, padding: number): Buffer {
  const parts = [Buffer.from('ffd8ff', 'hex')]
  for (let left = padding; left > 0; left -= 60_000) {
    const segment = Buffer.alloc(4 + Math.min(left, 60_000), 0xc0)
    segment.writeUInt16BE(0xffe1, 0)
    segment.writeUInt16BE(segment.length - 2, 2)
    parts.push(segment, Buffer.from('ff', 'hex'))
  }
  const frame = Buffer.from('c4000400ffff' + 'ffc200110800000000' + '03012200021101031101', 'hex')
  frame.writeUInt16BE(height, 11)
  frame.writeUInt16BE(width, 13)
  return Buffer.concat([...parts, frame, Buffer.alloc(64)])
}

/** Rows from the top, as in screenshots. */
export function bmp (width: number, height: number): Buffer {
  const bytes = Buffer.alloc(64)
  bytes.write('BM', 'latin1')
  bytes.writeUInt32LE(40, 14)
  bytes.writeInt32LE(width, 18)
  bytes.writeInt32LE(-height, 22)
  return bytes
}

function riff (chunk: string): Buffer {
  const bytes = Buffer.alloc(64)
  bytes.write(`RIFF\0\0\0\0WEBP${chunk}`, 'latin1')
  return bytes
}

export function webpLossy (width: number, height: number): Buffer {
  const bytes = riff('VP8 ')
  bytes.writeUInt16LE(width, 26)
  bytes.writeUInt16LE(height | 0x4000, 28)
  return bytes
}

export function webpLossless (width: number, height: number): Buffer {
  const bytes = riff('VP8L')
  bytes[20] = 0x2f
  bytes.writeUInt32LE(((width - 1) | ((height - 1) << 14)) >>> 0, 21)
  return bytes
}

export function webpExtended (width: number, height: number): Buffer {
  const bytes = riff('VP8X')
  bytes.writeUIntLE(width - 1, 24, 3)
  bytes.writeUIntLE(height - 1, 27, 3)
  return bytes
}
