import { epdError } from '../errors.ts'

/**
 * A client's path, as it goes on below a node's URL.
 *
 * @throws EPD_ERR_INVALID_PATH for `.` and `..`, however written: a proxy in front of a node would take them for steps out of `/v1`
 */
export function upstreamPath (url: string): string {
  const [path] = url.split('?', 1) as [string]
  if (decodeURIComponent(path).split(/[/\\]/).some(segment => segment === '.' || segment === '..')) throw epdError('EPD_ERR_INVALID_PATH', [path])
  return url
}
