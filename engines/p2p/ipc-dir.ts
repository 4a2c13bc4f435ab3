import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { readdir, stat } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir, userInfo } from 'node:os'
import { join } from 'node:path'

const PREFIX = 'fastify-epd-'
const SOCKET = 's'
/** sockaddr_un holds 108 bytes on Linux and 104 on macOS, the closing zero included. */
const MAX_SOCKET_PATH = 103
/** Younger directories are left alone: their owner may be about to listen. */
const MIN_STALE_AGE_MS = 60_000

export interface IpcDir {
  address: string
  remove: () => void
}

/**
 * A private directory (mkdtemp makes it 0700) with room for one socket file; undefined where there are no such sockets, or
 * no directory with a short enough path. Only this user can get at the socket.
 */
export function makeIpcDir (): IpcDir | undefined {
  if (process.platform === 'win32') return undefined
  for (const base of new Set([tmpdir(), '/tmp'])) {
    if (Buffer.byteLength(join(base, `${PREFIX}XXXXXX`, SOCKET)) > MAX_SOCKET_PATH) continue
    try {
      const dir = mkdtempSync(join(base, PREFIX))
      return { address: `ipc://${join(dir, SOCKET)}`, remove: () => rmSync(dir, { recursive: true, force: true }) }
    } catch { /* not writable: try the next one */ }
  }
  return undefined
}

/**
 * Removes what killed engines left behind: our directories of this user whose socket has no listener.
 *
 * @param base where to look
 * @param minAgeMs how old they must be
 */
export async function sweepIpcDirs (base: string = tmpdir(), minAgeMs: number = MIN_STALE_AGE_MS): Promise<void> {
  const names = await readdir(base).catch(() => [])
  for (const name of names) {
    if (!name.startsWith(PREFIX)) continue
    const dir = join(base, name)
    const info = await stat(dir).catch(() => undefined)
    if (info === undefined || info.uid !== userInfo().uid || Date.now() - info.mtimeMs < minAgeMs) continue
    const socket = join(dir, SOCKET)
    if (existsSync(socket) && await refuses(socket)) rmSync(dir, { recursive: true, force: true })
  }
}

/** True only when the kernel says that no process listens: a busy listener, or one we may not reach, is alive. */
function refuses (path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path)
    socket.once('connect', () => {
      socket.destroy()
      resolve(false)
    })
    socket.once('error', (err: NodeJS.ErrnoException) => resolve(err.code === 'ECONNREFUSED'))
  })
}
