import { Router, type Context } from 'zeromq'

const Z85 = '0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#'
export const ZAP_DOMAIN = 'fastify-epd'

/** Z85 text of a key of 32 bytes, which ZAP gives in binary (rfc.zeromq.org/spec/32). */
export function z85 (key: Uint8Array): string {
  const view = new DataView(key.buffer, key.byteOffset, key.byteLength)
  let text = ''
  for (let at = 0; at + 4 <= key.byteLength; at += 4) {
    let value = view.getUint32(at)
    let group = ''
    for (let digit = 0; digit < 5; digit++) {
      group = (Z85[value % 85] as string) + group
      value = Math.floor(value / 85)
    }
    text += group
  }
  return text
}

/**
 * Answers libzmq's question "may this client in?" (rfc.zeromq.org/spec/27) for CURVE: by its public key. One handler per
 * zeromq context, which is why a transfer worker with keys has a context of its own.
 */
export async function startZap (context: Context, allowedPeers: ReadonlySet<string>, onRefused: (key: string, address: string) => void, fatal: (err: unknown) => void): Promise<Router> {
  const socket = new Router({ context, linger: 0, sendTimeout: 1000 })
  await socket.bind('inproc://zeromq.zap.01')
  const answer = async (): Promise<void> => {
    for await (const frames of socket) {
      const [peer, empty, version, request, domain, address, , mechanism, key] = frames
      if (request === undefined) continue
      const name = mechanism?.toString() === 'CURVE' && domain?.toString() === ZAP_DOMAIN && key?.length === 32 ? z85(key) : ''
      const allowed = allowedPeers.has(name)
      if (!allowed) onRefused(name, String(address))
      await socket.send([peer as Buffer, empty as Buffer, version as Buffer, request, allowed ? '200' : '400', allowed ? 'OK' : 'unknown key', '', ''])
    }
  }
  answer().catch((err: unknown) => { if (!socket.closed) fatal(err) })
  return socket
}
