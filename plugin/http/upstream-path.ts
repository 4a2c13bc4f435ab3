import { epdError } from '../errors.ts'

/**
 * A client's path, to be continued below a node's URL.
 *
 * @throws EPD_ERR_INVALID_PATH for `.` and `..`, however written: a proxy in front of a node would take them for steps
 * out of `/v1`. Some decode twice (`%252e`), some cut parameters off a segment first (`..;x`).
 */
export function upstreamPath (url: string): string {
  const [path] = url.split('?', 1) as [string]
  for (let text = path, last = ''; text !== last; last = text, text = decoded(text)) {
    if (text.split(/[/\\]/).some(segment => /^\.\.?(;|$)/.test(segment))) throw epdError('EPD_ERR_INVALID_PATH', [path])
  }
  return path.replace(/\/{2,}/g, '/') + url.slice(path.length)
}

function decoded (text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text
  }
}
