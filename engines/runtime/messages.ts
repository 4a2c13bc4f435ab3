import type { Device } from './types.ts'

/** workerData of a session worker. */
export interface WorkerInit {
  readonly program: string
  readonly device: Device
  readonly threads: number
  readonly data: unknown
  readonly pools: Readonly<Record<string, SharedArrayBuffer>>
}

export type ToWorker =
  | { readonly type: 'call', readonly id: number, readonly method: string, readonly args: unknown }
  | { readonly type: 'close' }

/** An error as it crosses threads: classes do not. */
export interface RemoteError {
  readonly name: string
  readonly message: string
  readonly stack: string | undefined
}

export type FromWorker =
  | { readonly type: 'ready' }
  | { readonly type: 'failed', readonly error: RemoteError }
  | { readonly type: 'result', readonly id: number, readonly value: unknown, readonly busyUs: number, readonly ortUs: number }
  | { readonly type: 'error', readonly id: number, readonly error: RemoteError }

export function toRemoteError (err: unknown): RemoteError {
  if (err instanceof Error) return { name: err.name, message: err.message, stack: err.stack }
  return { name: 'Error', message: String(err), stack: undefined }
}

/** An error thrown in a worker, as its host throws it: `name` is the original's, `cause.stack` where it happened. */
export class ProgramError extends Error {
  constructor (remote: RemoteError) {
    super(remote.message, { cause: remote })
    this.name = remote.name
  }
}
