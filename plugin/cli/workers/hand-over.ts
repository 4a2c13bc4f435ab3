/**
 * Connections that the primary has given to a worker which dies before it has taken them go to another worker. Node.js 20
 * waits for the dead one's answer instead: it never says `disconnect`, and the clients wait for ever.
 */
import cluster, { type Worker } from 'node:cluster'

interface NewConnection { readonly cmd?: string, readonly act?: string, readonly seq?: number }
interface Handle { close? (): void }
type Send = (message: NewConnection, handle?: Handle, ...rest: unknown[]) => boolean

/** Answers of a worker that has died are still read for so long. Milliseconds. */
const LAST_WORDS_MS = 50

/** What Node.js' cluster says to itself: a worker answers a connection with `accepted`; one that ends in good order refuses. */
export function rescueConnections (worker: Worker): void {
  const given = new Map<number, Handle | undefined>()
  const { process: child } = worker
  const send = child.send.bind(child) as Send
  child.send = ((message: NewConnection, handle?: Handle, ...rest: unknown[]) => {
    if (message.cmd === 'NODE_CLUSTER' && message.act === 'newconn' && message.seq !== undefined) given.set(message.seq, handle)
    return send(message, handle, ...rest)
  }) as typeof child.send
  child.on('internalMessage', ({ ack }: { readonly ack?: number }) => { if (ack !== undefined) given.delete(ack) })
  child.once('exit', () => { setTimeout(() => { child.emit('disconnect') }, LAST_WORDS_MS) })
  // The cluster's own listener comes before: by now it gives this worker nothing more.
  child.once('disconnect', () => {
    const others = Object.values(cluster.workers ?? {}).some(other => other !== undefined && other !== worker && other.isConnected())
    for (const [ack, handle] of [...given]) {
      if (others) child.emit('internalMessage', { cmd: 'NODE_CLUSTER', ack, accepted: false })
      else handle?.close?.()
    }
  })
}
