import { epdError } from '../errors.ts'

/** How often a path may be encoded: each round costs time in its length, and none in use decodes more than twice. */
const ROUNDS = 5

/**
 * A client's path, to be continued below a node's URL.
 *
 * @throws EPD_ERR_INVALID_PATH for `.` and `..`, however written: a proxy in front of a node would take them for steps
 * out of `/v1`. Some decode twice (`%252e`), some cut parameters off a segment first (`..;x`).
 */
export function upstreamPath (url: string): string {
  const [path] = url.split('?', 1) as [string]
  const invalid = (): Error => epdError('EPD_ERR_INVALID_PATH', [path.length > 200 ? `${path.slice(0, 200)}...` : path])
  for (let text = path, round = 0, next; ; text = next, round++) {
    if (text.split(/[/\\]/).some(segment => /^\.\.?(;|$)/.test(segment))) throw invalid()
    next = decoded(text)
    if (next === text) break
    if (round === ROUNDS) throw invalid()
  }
  return path.replace(/\/{2,}/g, '/') + url.slice(path.length)
}

/** A path that `upstreamPath` has passed, as the least careful server reads it. Starlette's routes end before a line feed. */
export function plainPath (path: string): string {
  let [text] = path.split('?', 1) as [string]
  for (let last = ''; text !== last;) [last, text] = [text, decoded(text)]
  return text.replace(/[?#].*/s, '').replace(/;[^/\\]*/g, '').replace(/[/\\]+/g, '/').trim()
}

/** Byte by byte: one that is no UTF-8 must not keep others from being decoded. */
function decoded (text: string): string {
  return text.replace(/%[\da-f]{2}/gi, byte => String.fromCharCode(parseInt(byte.slice(1), 16)))
}
