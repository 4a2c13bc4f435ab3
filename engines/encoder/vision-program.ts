/** Runs in the session worker: joins the items of a batch, runs the vision graph once, writes features into feature blocks. */
import { allFinite } from '../p2p/finite.ts'
import type { VisionInput } from '../models/index.ts'
import type { CreateProgram, Session, TensorArrays, TensorData } from '../runtime/index.ts'

export interface VisionProgramData {
  readonly path: string
  readonly hiddenSize: number
  /** Rows of features in one block. */
  readonly blockTokens: number
}

export interface VisionJob {
  readonly inputs: readonly VisionInput[]
  readonly numTokens: number
  readonly blocks: readonly number[]
}

export type VisionMethods = {
  /** One run for all items. Answers for each whether its features are finite: those of one picture say nothing of the others. */
  encode (items: readonly VisionJob[]): Promise<boolean[]>
}

type AnyArray = TensorArrays[keyof TensorArrays]

/** Grown as batches grow and kept: a fresh buffer each time would cost a page fault every 4 KiB. */
const joinBuffers = new Map<string, ArrayBuffer>()

function joinBuffer (name: string, bytes: number): ArrayBuffer {
  let buffer = joinBuffers.get(name)
  if (buffer === undefined || buffer.byteLength < bytes) joinBuffers.set(name, buffer = new ArrayBuffer(bytes))
  return buffer
}

/** One input of all items, end to end. */
function join (items: readonly VisionJob[], position: number): [string, TensorData] {
  const parts = items.map(item => item.inputs[position] as VisionInput)
  const [first] = parts as [VisionInput]
  if (parts.length === 1) return [first.name, first.tensor]
  const dims = [...first.tensor.dims]
  dims[first.batchAxis] = parts.reduce((n, part) => n + (part.tensor.dims[part.batchAxis] as number), 0)
  const { BYTES_PER_ELEMENT: width } = first.tensor.data
  const length = dims.reduce((n, d) => n * d, 1)
  const Type = first.tensor.data.constructor as new (buffer: ArrayBuffer, offset: number, length: number) => AnyArray
  const data = new Type(joinBuffer(first.name, length * width), 0, length)
  let at = 0
  for (const { tensor } of parts) {
    data.set(tensor.data as never, at)
    at += tensor.data.length
  }
  return [first.name, { type: first.tensor.type, dims, data } as TensorData]
}

/** Copies rows of features into blocks, and checks them. The last block may stay partly empty. */
function scatter (features: Uint8Array, dtype: 'float32' | 'float16', jobs: readonly VisionJob[], pool: SharedArrayBuffer, rowBytes: number, blockTokens: number): boolean[] {
  const blockBytes = rowBytes * blockTokens
  let at = 0
  return jobs.map(({ numTokens, blocks }) => {
    let left = numTokens * rowBytes
    let finite = true
    for (const block of blocks) {
      const length = Math.min(left, blockBytes)
      const into = new Uint8Array(pool, block * blockBytes, length)
      into.set(features.subarray(at, at + length))
      finite &&= allFinite(into, dtype)
      at += length
      left -= length
    }
    return finite
  })
}

/** The output that holds features: by its usual name, else the only sensible one, the first. */
function featureOutput (session: Session): string {
  const output = session.outputs.find(o => o.name === 'image_features') ?? session.outputs[0]
  if (output === undefined) throw new Error('the vision graph has no output')
  return output.name
}

export const create: CreateProgram<VisionProgramData, VisionMethods> = async ({ openSession, data, pools }) => {
  const session = await openSession(data.path)
  const output = featureOutput(session)
  const pool = pools.feature
  if (pool === undefined) throw new Error('the vision program needs the feature pool')
  return {
    encode: async items => {
      const [first] = items
      if (first === undefined) return []
      const feeds = Object.fromEntries(first.inputs.map((_, position) => join(items, position)))
      const features = (await session.run(feeds, [output]))[output] as TensorData
      const rows = items.reduce((n, item) => n + item.numTokens, 0)
      const { buffer, byteOffset, byteLength } = features.data
      const rowBytes = data.hiddenSize * features.data.BYTES_PER_ELEMENT
      if (byteLength !== rows * rowBytes) {
        throw new Error(`${data.path} gave features of shape [${features.dims.join(', ')}], ${rows} rows of ${data.hiddenSize} were expected`)
      }
      return scatter(new Uint8Array(buffer, byteOffset, byteLength), features.type === 'float16' ? 'float16' : 'float32', items, pool, rowBytes, data.blockTokens)
    }
  }
}
