/** The session worker: loads one program, runs its methods, and says how long they took and how much of it was onnxruntime. */
import { parentPort, workerData } from 'node:worker_threads'
import type { FromWorker, ToWorker, WorkerInit } from './messages.ts'
import { toRemoteError } from './messages.ts'
import type { CreateProgram, OpenSessionOptions, ProgramMethods, Session } from './types.ts'
import { isTransferring } from './types.ts'

if (parentPort === null) throw new Error('session-worker runs in a worker thread only')
const port = parentPort
const init = workerData as WorkerInit
const sessions = new Set<Session>()
const active = new Set<Promise<void>>()
let ortMicroseconds = (): number => 0

function post (message: FromWorker, transfer: readonly ArrayBuffer[] = []): void {
  port.postMessage(message, transfer)
}

async function openSession (path: string, options?: OpenSessionOptions): Promise<Session> {
  // Imported here so that a program without sessions (preprocessing) never loads the native library.
  const ort = await import('./ort.ts')
  ortMicroseconds = ort.ortMicroseconds
  const session = await ort.openSession(path, init.device, init.threads, options)
  sessions.add(session)
  return session
}

async function start (): Promise<ProgramMethods> {
  const module = await import(init.program) as { create?: CreateProgram<unknown, ProgramMethods> }
  if (typeof module.create !== 'function') throw new Error(`program ${init.program} exports no function "create"`)
  return await module.create({ openSession, data: init.data, pools: init.pools, device: init.device })
}

async function call (methods: ProgramMethods, id: number, name: string, args: unknown): Promise<void> {
  const begin = performance.now()
  const ortBegin = ortMicroseconds()
  try {
    const method = methods[name] as ((args: unknown) => unknown) | undefined
    if (method === undefined) throw new Error(`program has no method "${name}"`)
    const result = await method(args)
    const busyUs = (performance.now() - begin) * 1000
    const ortUs = ortMicroseconds() - ortBegin
    if (isTransferring(result)) post({ type: 'result', id, value: result.value, busyUs, ortUs }, result.transfer)
    else post({ type: 'result', id, value: result, busyUs, ortUs })
  } catch (err) {
    post({ type: 'error', id, error: toRemoteError(err) })
  }
}

function track (running: Promise<void>): void {
  active.add(running)
  running.finally(() => active.delete(running)).catch(() => {})
}

async function close (): Promise<void> {
  // A method in the middle of its runs still needs its sessions.
  await Promise.all(active)
  for (const session of sessions) await session.release().catch(() => {})
  port.close()
}

try {
  const methods = await start()
  port.on('message', (message: ToWorker) => {
    if (message.type === 'close') close().catch(() => port.close())
    else track(call(methods, message.id, message.method, message.args))
  })
  post({ type: 'ready' })
} catch (err) {
  post({ type: 'failed', error: toRemoteError(err) })
  port.close()
}
