/** The connections that the gateway keeps to its nodes, and what a connection's end says. */
import { Agent, Client, type Dispatcher } from 'undici'
import { AdapterError } from '../adapter.ts'
import { codeOf } from './failures.ts'

/** uvicorn closes idle connections after 5 s, and undici's timers may be a second late. */
const KEEP_ALIVE_MS = 2_500

/** When each connection was made, and by the error with which it ended, on the clock of `performance.now()`. */
const madeAt = new WeakMap<object, number>()

/** The gateway's connections to its nodes. */
export class Connections extends Agent {
  /** A dispatcher that opens a connection for each request, which no server can have closed before. */
  readonly fresh: Dispatcher

  constructor (connectTimeout: number) {
    const options = { keepAliveTimeout: KEEP_ALIVE_MS, keepAliveMaxTimeout: KEEP_ALIVE_MS, connect: { timeout: connectTimeout } }
    super(options)
    this.fresh = {
      dispatch: (request: Dispatcher.DispatchOptions, handler: Dispatcher.DispatchHandler) => {
        const client = new Client(request.origin!, options)
        client.dispatch(request, handler)
        // Waits for the answer.
        client.close().catch(() => {})
        return true
      }
    } as unknown as Dispatcher
    this.on('connect', (_origin, targets) => { madeAt.set(targets.at(-1)!, performance.now()) })
    this.on('disconnect', (_origin, targets, error) => { madeAt.set(error, madeAt.get(targets.at(-1)!) ?? Infinity) })
  }
}

const CUT: ReadonlySet<string | undefined> = new Set(['ECONNRESET', 'EPIPE', 'UND_ERR_SOCKET'])
/** A server that closes an idle connection does so at once; one that has worked on the request for longer has seen it. */
const AT_ONCE_MS = 1_000

/**
 * Where to send a request again that broke off before any byte of an answer; undefined when it must not be. A kept
 * connection may have been closed by its server at that moment: it has not looked at the request, and there is no one to blame.
 *
 * @param always the request may be sent twice whatever the node has seen
 */
export function anotherTry (error: unknown, sentAt: number, always: boolean, dispatcher: Dispatcher): Dispatcher | undefined {
  if (!AdapterError.is(error) || !CUT.has(codeOf(error.cause))) return undefined
  if (!always && !(wasKept(error.cause as Error, sentAt) && performance.now() - sentAt < AT_ONCE_MS)) return undefined
  return dispatcher instanceof Connections ? dispatcher.fresh : dispatcher
}

function wasKept (cause: Error & { socket?: { bytesRead?: number } }, sentAt: number): boolean {
  const made = madeAt.get(cause)
  return made === undefined ? (cause.socket?.bytesRead ?? 0) > 0 : made < sentAt
}
