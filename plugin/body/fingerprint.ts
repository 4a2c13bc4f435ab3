const FNV_PRIME = 0x01000193
/** Of long texts so many places are read, evenly apart, of so many bytes each: no two compressed pictures are alike there. */
const PLACES = 64
const WIDTH = 32
/** What two texts of one length differ in often stands last: all of that is read, in bytes. */
const END = 128
const WHOLE = PLACES * WIDTH + END

/**
 * Names bytes well enough to choose a node by them, in a few microseconds: the length and a sample. Never a proof that
 * two are the same: a client can make different ones with one name, and only its own requests meet at one node then.
 */
export function fingerprint (bytes: Buffer, start = 0, end = bytes.length): string {
  const length = end - start
  let hash = Math.imul(length, FNV_PRIME)
  const read = (from: number, to: number): void => { for (let i = from; i < to; i++) hash = Math.imul(hash ^ bytes[i]!, FNV_PRIME) }
  if (length <= WHOLE) read(start, end)
  else {
    for (let place = 0; place < PLACES; place++) {
      const from = start + Math.floor(place * (length - END - WIDTH) / (PLACES - 1))
      read(from, from + WIDTH)
    }
    read(end - END, end)
  }
  return (hash >>> 0).toString(36)
}
