/**
 * The only importer of onnxruntime-node. Loaded in session workers, never in the main thread: `run` is synchronous
 * and holds its thread.
 */
import type { InferenceSession, Tensor } from 'onnxruntime-node'
import { requireOptional } from '../service/optional.ts'
import { cudaIndex } from './device.ts'
import type { Device, OpenSessionOptions, Session, TensorData, TensorSpec, TensorType } from './types.ts'

type Ort = typeof import('onnxruntime-node')

let ort: Ort | undefined

/** Microseconds this thread has spent inside `run`. */
let spent = 0

export function ortMicroseconds (): number {
  return spent
}

/**
 * onnxruntime-node 1.29 stores float16 in a Uint16Array and fails on Node >= 24, where onnxruntime-common would use
 * Float16Array instead ("not enough space: expected N, got 0"). It looks for that class once, at the first tensor, so
 * the class is hidden from it for that moment.
 */
function withoutFloat16Array (makeTensor: () => unknown): void {
  const own = Object.getOwnPropertyDescriptor(globalThis, 'Float16Array')
  if (own !== undefined) Reflect.deleteProperty(globalThis, 'Float16Array')
  try {
    makeTensor()
  } finally {
    if (own !== undefined) Object.defineProperty(globalThis, 'Float16Array', own)
  }
}

function getOrt (): Ort {
  if (ort !== undefined) return ort
  const loaded = requireOptional('onnxruntime-node') as Ort
  // What fails is thrown with its message; onnxruntime would also print it, in colour, to stderr.
  loaded.env.logLevel = 'fatal'
  withoutFloat16Array(() => new loaded.Tensor('float16', new Uint16Array(1), [1]))
  ort = loaded
  return loaded
}

function executionProvider (device: Device): InferenceSession.ExecutionProviderConfig {
  const deviceId = cudaIndex(device)
  return deviceId === undefined ? { name: 'cpu' } : { name: 'cuda', deviceId }
}

/** What to say when a session can't be made. Falling back to the CPU unasked would hide a tenfold loss of speed. */
function sessionError (path: string, device: Device, cause: unknown): Error {
  const reason = cause instanceof Error ? cause.message : String(cause)
  if (device !== 'cpu' && /shared library|CUDA|provider|backend not found|cudaGetDeviceCount/i.test(reason)) {
    return new Error(`device ${device} can't be used: ${reason}. It needs an NVIDIA driver, the CUDA libraries, and ` +
      'libonnxruntime_providers_cuda.so and libonnxruntime_providers_shared.so of exactly the installed version of onnxruntime-node beside its libonnxruntime.so', { cause })
  }
  return new Error(`${path} can't be opened as a session: ${reason}`, { cause })
}

function specs (metadata: readonly InferenceSession.ValueMetadata[], path: string): TensorSpec[] {
  return metadata.map(m => {
    if (!m.isTensor) throw new Error(`${path}: "${m.name}" is no tensor`)
    return { name: m.name, type: m.type as TensorType, shape: m.shape }
  })
}

/** Opens a session; the file is read by onnxruntime itself, so external data beside it is found. */
export async function openSession (path: string, device: Device, threads: number, options: OpenSessionOptions = {}): Promise<Session> {
  const { InferenceSession, Tensor } = getOrt()
  const executionProviders = [executionProvider(device)]
  let session: InferenceSession
  try {
    session = await InferenceSession.create(path, {
      executionProviders,
      intraOpNumThreads: options.threads ?? threads,
      interOpNumThreads: 1,
      executionMode: 'sequential',
      graphOptimizationLevel: 'all',
      logSeverityLevel: 4,
      // A thread that spins between operators takes a core from the other engines and from the thread that serves HTTP.
      extra: { session: { intra_op: { allow_spinning: '0' } } }
    })
  } catch (cause) {
    throw sessionError(path, device, cause)
  }
  return new OrtSession(session, Tensor, path)
}

class OrtSession implements Session {
  readonly inputs: readonly TensorSpec[]
  readonly outputs: readonly TensorSpec[]
  readonly #session: InferenceSession
  readonly #Tensor: Ort['Tensor']
  readonly #path: string

  constructor (session: InferenceSession, TensorClass: Ort['Tensor'], path: string) {
    this.inputs = specs(session.inputMetadata, path)
    this.outputs = specs(session.outputMetadata, path)
    this.#session = session
    this.#Tensor = TensorClass
    this.#path = path
  }

  async run (feeds: Readonly<Record<string, TensorData>>, fetches?: readonly string[]): Promise<Record<string, TensorData>> {
    const tensors: Record<string, Tensor> = {}
    const missing: string[] = []
    for (const { name } of this.inputs) {
      const feed = feeds[name]
      if (feed === undefined) missing.push(name)
      else tensors[name] = new this.#Tensor(feed.type, feed.data, feed.dims)
    }
    if (missing.length > 0) throw new Error(`${this.#path}: missing inputs: ${missing.join(', ')}`)
    const start = performance.now()
    try {
      const out = fetches === undefined ? await this.#session.run(tensors) : await this.#session.run(tensors, [...fetches])
      return out as unknown as Record<string, TensorData>
    } finally {
      spent += (performance.now() - start) * 1000
    }
  }

  async release (): Promise<void> {
    await this.#session.release()
  }
}
