/**
 * What programs and their hosts exchange. A program is a module that runs in a session worker: it opens sessions,
 * gathers tensors out of block pools and scatters results back. It never sees onnxruntime-node itself.
 */
import type { EngineLog } from '../service/engine-service.ts'

/** Where sessions run. `cuda` is `cuda:0`. */
export type Device = 'cpu' | 'cuda' | `cuda:${number}`

/** Element types a session takes and gives; `float16` travels as the bits in a Uint16Array. */
export interface TensorArrays {
  float32: Float32Array
  float16: Uint16Array
  int64: BigInt64Array
  int32: Int32Array
  int8: Int8Array
  uint8: Uint8Array
  bool: Uint8Array
}
export type TensorType = keyof TensorArrays

/** A dense tensor, row-major. `data` must not lie over a SharedArrayBuffer: sessions refuse it. */
export type TensorData = { [T in TensorType]: { readonly type: T, readonly dims: readonly number[], readonly data: TensorArrays[T] } }[TensorType]

/** An input or output as the graph declares it. A dimension is a number, or the name of a free one. */
export interface TensorSpec {
  readonly name: string
  readonly type: TensorType
  readonly shape: ReadonlyArray<number | string>
}

export interface OpenSessionOptions {
  /** Threads of this session, when it should differ from the host's. */
  readonly threads?: number
}

export interface Session {
  readonly inputs: readonly TensorSpec[]
  readonly outputs: readonly TensorSpec[]
  /**
   * Runs the graph. Blocks this thread. Every output named in `fetches` (default: all) is copied out at about
   * 1 ms per MB, so name only what is needed.
   * @throws when an input of the graph is missing (all of them are named) or does not fit.
   */
  run (feeds: Readonly<Record<string, TensorData>>, fetches?: readonly string[]): Promise<Record<string, TensorData>>
  release (): Promise<void>
}

/** What a program gets to build itself from. */
export interface ProgramContext<D = unknown> {
  openSession (path: string, options?: OpenSessionOptions): Promise<Session>
  /** Structured clone of what the host was given. */
  readonly data: D
  /** Block pools by name, shared with the host and other workers. */
  readonly pools: Readonly<Record<string, SharedArrayBuffer>>
  readonly device: Device
}

/** Methods by name; each takes one structured-clonable argument. Return {@link transferring} to move buffers instead of copying them. */
// `never` lets any one-argument function be a method; the host's `call` restores the true types.
export type ProgramMethods = Record<string, (args: never) => unknown>

/** A program module exports this function under the name `create`. */
export type CreateProgram<D, M extends ProgramMethods> = (context: ProgramContext<D>) => M | Promise<M>

const kTransfer = Symbol('transfer')

export interface Transferring<T> {
  readonly [kTransfer]: true
  readonly value: T
  readonly transfer: readonly ArrayBuffer[]
}

/** Marks a method's result so that `transfer` is moved to the host's thread, not copied. */
export function transferring<T> (value: T, transfer: readonly ArrayBuffer[]): Transferring<T> {
  return { [kTransfer]: true, value, transfer }
}

export function isTransferring (value: unknown): value is Transferring<unknown> {
  return typeof value === 'object' && value !== null && kTransfer in value
}

/** The value a method gives to the caller of `ProgramHost.call`. */
export type MethodValue<F> = F extends (args: never) => infer R
  ? (Awaited<R> extends Transferring<infer T> ? T : Awaited<R>)
  : never

/** The argument a method takes. */
export type MethodArgs<F> = F extends (args: infer A) => unknown ? A : never

export interface CallResult<T> {
  readonly value: T
  /** Time the method took in the worker, microseconds. */
  readonly busyUs: number
  /** How much of it was inside onnxruntime, microseconds. */
  readonly ortUs: number
}

export interface ProgramHostOptions<D> {
  /** Compiled program module: `new URL('./program.js', import.meta.url)`. */
  readonly program: URL
  readonly device: Device
  /** Threads of each session (intra-op). See `threadsPerEngine`. */
  readonly threads: number
  readonly data: D
  readonly pools?: Readonly<Record<string, SharedArrayBuffer>>
  /** Name of the thread, for logs and errors. */
  readonly name?: string
  /**
   * Calls in the worker at once. More than one only helps programs that wait for other threads (sharp's), never sessions.
   * @default 1
   */
  readonly concurrency?: number
  readonly log?: Pick<EngineLog, 'warn' | 'error'> | undefined
}

export interface CallOptions {
  readonly transfer?: readonly ArrayBuffer[]
  /** Rejects with the signal's reason while the call still waits; a running call can't be interrupted and is awaited. */
  readonly signal?: AbortSignal | undefined
}
