/** A worker: one of several processes that serve requests under one port. The primary starts it, and knows what they share. */
import { rmSync } from 'node:fs'
import { dirname } from 'node:path'
import type { FastifyInstance } from 'fastify'
import { abortable } from '../../../adapters/abort.ts'
import type { CallSignal } from '../../../adapters/adapter.ts'
import { epdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import type { KeyCounts } from '../../http/keys/rates.ts'
import { epdWith } from '../../index.ts'
import { resolveOptions } from '../../options/index.ts'
import { Admission, type Pass, type Work } from '../../pipeline/admission.ts'
import type { SavedNodes } from '../../registry/index.ts'
import { reload } from '../../reload.ts'
import { logAccess } from '../access-log.ts'
import { createServer, listen, tuneV8 } from '../gateway-process.ts'
import { tlsFiles } from '../tls.ts'
import type { ToPrimary, ToWorker } from './calls.ts'
import { Channel } from './channel.ts'
import { passToPrimary } from './operators.ts'
import { optionsOfWorker } from './options.ts'
import { meetAtOwner } from './part-calls.ts'
import { Reports } from './reports.ts'

/** Until then the nodes should have been probed. Milliseconds. */
const PROBED_MS = 3_000

type Primary = Channel<ToPrimary, ToWorker>

async function main (): Promise<void> {
  tuneV8()
  let ready!: (calls: ToWorker) => void
  const calls = new Promise<ToWorker>(resolve => { ready = resolve })
  const primary: Primary = new Channel<ToPrimary, ToWorker>(message => { process.send!(message) }, {
    nodes: async nodes => { (await calls).nodes(nodes) },
    has: async call => (await calls).has(call),
    reload: async options => { (await calls).reload(options) },
    flush: async none => { (await calls).flush(none) },
    picture: async place => await (await calls).picture(place),
    close: async none => { (await calls).close(none) }
  })
  process.on('message', message => { primary.receive(message) })
  let close = async (): Promise<void> => { process.exit(0) }
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => { close() })
  // The primary's to hear.
  process.on('SIGHUP', () => {})

  const { options, shares, nodes, logLevel, socket, own } = await primary.call('birth', null)
  // A primary that is killed leaves its folder behind, and its workers end.
  process.on('exit', () => { if (!process.connected) rmSync(dirname(socket), { recursive: true, force: true }) })
  const reports = new Reports(events => { primary.tell('happened', events) })
  const raw = { ...optionsOfWorker(options, shares), telemetry: { ...options.telemetry, ...(options.telemetry?.traces === false ? {} : { store: reports.spans }) } }
  const resolved = resolveOptions(raw)
  const files = resolved.server.tls === undefined ? undefined : tlsFiles(resolved.server.tls)
  const app = createServer(resolved, logLevel, files)
  if (resolved.server.accessLog) logAccess(app, resolved.prefix)
  passToPrimary(app, resolved.prefix, socket)
  meetAtOwner(app, { prefix: resolved.prefix, socket: own, ownerOf: async call => await primary.call('ownerOf', call) })
  await app.register(epdWith({ Admission: admissionAt(primary), keys: keysAt(primary) }), raw)
  const { gateway } = app.epd
  reports.follow(gateway)
  follow(gateway, nodes)

  let closing: Promise<void> | undefined
  close = async () => { await (closing ??= end(app, async () => { await primary.call('happened', reports.last()) })) }
  ready({
    nodes: nodes => { follow(gateway, nodes) },
    has: ({ id, keys }) => gateway.callers.find(id, () => keys) !== undefined,
    reload: options => { reload(gateway, { ...resolveOptions({ ...optionsOfWorker(options, shares), telemetry: raw.telemetry }), nodes: gateway.options.nodes }) },
    flush: () => { reports.flush() },
    picture: async ({ trace, index }) => {
      const found = await gateway.thumbnails?.find(trace, index)
      return found === undefined ? null : { type: found.type, base64: found.bytes.toString('base64') }
    },
    close: () => { close() }
  })
  // A worker that takes the place of another one must not send away what that one would have served.
  const probed = AbortSignal.timeout(PROBED_MS)
  await gateway.registry.waitFor(({ nodes }) => nodes.every(({ state }) => state !== 'unknown'), { signal: probed }).catch(() => {})
  primary.tell('listening', await listen(app, resolved, files))
}

async function end (app: FastifyInstance, farewell: () => Promise<void>): Promise<never> {
  await app.close()
  await farewell()
  process.exit(0)
}

/** The primary's nodes, and no others. */
function follow (gateway: Gateway, { nodes, drained }: SavedNodes): void {
  const { registry } = gateway
  gateway.options = { ...gateway.options, nodes }
  registry.configure(nodes)
  for (const { id } of registry.snapshot().nodes) registry.drain(id, drained.includes(id))
}

/** What is bounded is bounded over all workers: the primary counts. */
function admissionAt (primary: Primary): typeof Admission {
  let entries = 0
  return class extends Admission {
    override async enter (work: Work, signal: CallSignal): Promise<Pass> {
      const id = entries++
      let left = false
      const leave = (): void => {
        if (left) return
        left = true
        primary.tell('leave', id)
      }
      signal.addEventListener('abort', leave)
      try {
        const { admitted, retryAfter } = await abortable(primary.call('enter', { id, work }), signal)
        if (!admitted) throw epdError('EPD_ERR_OVERLOADED', [], { retryAfter })
      } finally {
        signal.removeEventListener('abort', leave)
      }
      return { leaveEncoders: () => { if (!left) primary.tell('leaveEncoders', id) }, release: leave }
    }
  }
}

function keysAt (primary: Primary): KeyCounts {
  return {
    take: async (key, kind, amount) => {
      const { rate, away } = await primary.call('takeRate', { key, kind, amount })
      if (away !== undefined) throw epdError('EPD_ERR_RATES_AWAY', [], { cause: new Error(away) })
      return rate
    },
    begin: async ({ name, concurrency }) => await primary.call('beginWithKey', { name, concurrency }),
    end: name => { primary.tell('endWithKey', name) }
  }
}

main().catch((err: unknown) => {
  process.send!({ epd: 'call', name: 'failed', value: (err as Error).message }, () => { process.exit(1) })
})
