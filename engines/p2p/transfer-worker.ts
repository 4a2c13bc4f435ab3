import { parentPort, workerData } from 'node:worker_threads'
import { Context, context as sharedContext, type Router } from 'zeromq'
import type { PoolName } from '../cache/index.ts'
import type { BlockMemory } from './block-copy.ts'
import { BlockServer } from './block-server.ts'
import { deferred, type Deferred } from '../service/waiting.ts'
import { P2PError } from './types.ts'
import { Link, type Started } from './link.ts'
import type { FromWorker, ToWorker, Verdict, WorkerData } from './messages.ts'
import { startZap } from './zap.ts'

/** A stranger can send offers faster than the main thread takes them, which answers nothing else while it has any. */
const MAX_OFFERS = 64

/*
 * The transfer worker: the only thread that touches ZeroMQ. It serves this engine's blocks to others and pulls theirs,
 * straight between sockets and the pools' SharedArrayBuffers. What may be pulled is the main thread's to say.
 */
const data = workerData as WorkerData
const main = parentPort as NonNullable<typeof parentPort>
const post = (message: FromWorker): void => main.postMessage(message)
const log = (level: 'debug' | 'warn', fields: object, message: string): void => post({ op: 'log', level, data: fields, message })

const memory: Partial<Record<PoolName, BlockMemory>> = {}
for (const [name, { sab, blockBytes, numBlocks, dtype }] of Object.entries(data.pools)) {
  memory[name as PoolName] = { bytes: new Uint8Array(sab), blockBytes, numBlocks, dtype }
}

// With keys a context of its own: the address of the ZAP handler is fixed, and there may be several engines in a process.
// Only then, because zeromq frees such a context no earlier than when its last user in the process ends.
const context = data.curve === null ? sharedContext : new Context()
const links = new Map<string, Link>()
const calls = new Map<number, Started>()
const asks = new Map<number, Deferred<Verdict>>()
let lastAsk = 0
/** Offers that the main thread has not taken yet. */
let offers = 0
let zap: Router | undefined

/**
 * Ends the thread, which the main thread then starts anew. It ends by itself when its sockets are closed; zeromq aborts the
 * whole process when a thread ends by force.
 */
function fatal (err: unknown): void {
  log('warn', { err: err instanceof Error ? err.stack : String(err) }, 'the transfer worker failed')
  close()
}
process.on('uncaughtException', fatal)

const server = new BlockServer(context, data, memory, {
  nextAsk: () => ++lastAsk,
  ask: (question, ask) => {
    const verdict = deferred<Verdict>()
    asks.set(ask, verdict)
    post({ ...question, ask })
    return verdict.promise
  },
  fatal,
  offered: (offer) => {
    if (offers >= MAX_OFFERS) return false
    offers++
    post({ op: 'offered', offer })
    return true
  },
  over: (ask, served) => post({ op: 'pull-over', ask, served }),
  log
})

/** Runs a call and posts its outcome, once. */
function run (call: number, start: () => Started): void {
  const fail = (err: unknown): void => {
    const { code, message } = err instanceof P2PError ? err : new P2PError('GONE', String(err))
    post({ op: 'failed', call, code, message })
  }
  try {
    const started = start()
    calls.set(call, started)
    started.result.then((value) => post({ op: 'done', call, value })).catch(fail).finally(() => calls.delete(call))
  } catch (err) {
    fail(err)
  }
}

function linkTo (engineId: string): Link {
  const link = links.get(engineId)
  if (link === undefined) throw new P2PError('NOT_LINKED', `no link to ${engineId}`)
  return link
}

function close (): void {
  for (const link of links.values()) link.close('CLOSED', 'this engine is closing')
  links.clear()
  server.close()
  zap?.close()
  main.close()
}

main.on('message', (message: ToWorker) => {
  switch (message.op) {
    case 'connect': return run(message.call, () => {
      const { target } = message
      links.get(target.engineId)?.close('STALE', 'replaced by a new link')
      const link = new Link(context, data, memory, target, fatal)
      links.set(target.engineId, link)
      return link.open(message.traceparent)
    })
    case 'drop': {
      links.get(message.engineId)?.close(message.code, message.reason)
      links.delete(message.engineId)
      return
    }
    case 'pull': return run(message.call, () => linkTo(message.pull.engineId).pull(message.pull))
    case 'end': return run(message.call, () => linkTo(message.lease.engineId).end(message.how, message.lease, message.traceparent))
    case 'offer': return links.get(message.engineId)?.offer(message.lease, message.traceparent)
    case 'ask': return run(message.call, () => linkTo(message.lease.engineId).ask(message.lease))
    case 'cancel': return calls.get(message.call)?.cancel()
    case 'verdict': {
      asks.get(message.ask)?.resolve(message.verdict)
      asks.delete(message.ask)
      return
    }
    case 'offer-taken': {
      offers--
      return
    }
    case 'close': return close()
    default: return message satisfies never
  }
})

try {
  if (data.curve !== null) {
    zap = await startZap(context, new Set(data.allowedPeers), (key, address) => log('warn', { key, address }, 'refused a peer: unknown CURVE key'), fatal)
  }
  post({ op: 'listening', tcp: await server.listen() })
} catch (err) {
  post({ op: 'failed-to-start', message: (err as Error).message })
  close()
}
