import { fingerprint } from '../../plugin/body/index.ts'

/** The URL of another picture, with one letter changed, that has the fingerprint of this one: what a client could send to be taken for another. */
export function sameFingerprint (url: string): string {
  const bytes = Buffer.from(url)
  const wanted = fingerprint(bytes)
  for (let at = url.indexOf(',') + 1; at < bytes.length; at++) {
    const letter = bytes[at]!
    bytes[at] = letter === 0x41 ? 0x42 : 0x41
    if (letter !== bytes[at] && fingerprint(bytes) === wanted) return bytes.toString()
    bytes[at] = letter
  }
  throw new Error('the fingerprint covers all of it')
}
