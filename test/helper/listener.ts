import { readdir, readFile, readlink } from 'node:fs/promises'

/** The process that listens on a loopback port. */
export async function listenerPid (port: number): Promise<number> {
  const hex = port.toString(16).toUpperCase().padStart(4, '0')
  const line = (await readFile('/proc/net/tcp', 'utf8')).split('\n').find(entry => entry.includes(`:${hex} 00000000:0000 0A`))
  const inode = line!.trim().split(/\s+/)[9]
  for (const pid of (await readdir('/proc')).filter(name => /^\d+$/.test(name))) {
    const fds = await readdir(`/proc/${pid}/fd`).catch(() => [])
    const links = await Promise.all(fds.map(fd => readlink(`/proc/${pid}/fd/${fd}`).catch(() => '')))
    if (links.includes(`socket:[${inode}]`)) return Number(pid)
  }
  throw new Error(`no server listens on port ${port}`)
}
