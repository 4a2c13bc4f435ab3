/**
 * Reads the inputs and outputs of an ONNX file without loading it: weights are skipped by seeking. Engines need names
 * and element types before any session exists, as block pools are made first.
 *
 * ModelProto.graph is field 7; in GraphProto, initializer is 5, input 11, output 12; in ValueInfoProto name 1, type 2;
 * TypeProto.tensor_type 1; in it elem_type 1, shape 2; TensorShapeProto.dim 1; in it dim_value 1, dim_param 2.
 */
import { open, type FileHandle } from 'node:fs/promises'
import type { TensorSpec, TensorType } from '../runtime/types.ts'
import { ModelError, type GraphSignature } from './family.ts'

const ELEMENT_TYPES: Readonly<Record<number, TensorType>> = { 1: 'float32', 2: 'uint8', 3: 'int8', 6: 'int32', 7: 'int64', 9: 'bool', 10: 'float16' }
const WINDOW = 64 * 1024
/** Names and shapes are small; anything larger under these fields is not an ONNX file. */
const MAX_VALUE_INFO = 1024 * 1024

/** A file read through a window that moves forward; skipping costs nothing. */
class FileCursor {
  readonly #file: FileHandle
  readonly size: number
  #window = Buffer.alloc(0)
  #windowStart = 0
  position = 0

  constructor (file: FileHandle, size: number) {
    this.#file = file
    this.size = size
  }

  async #fill (length: number): Promise<void> {
    if (this.position >= this.#windowStart && this.position + length <= this.#windowStart + this.#window.length) return
    if (this.position + length > this.size) throw new Error('it ends too early')
    const buffer = Buffer.alloc(Math.min(Math.max(length, WINDOW), this.size - this.position))
    const { bytesRead } = await this.#file.read(buffer, 0, buffer.length, this.position)
    this.#window = buffer.subarray(0, bytesRead)
    this.#windowStart = this.position
    if (bytesRead < length) throw new Error('it ends too early')
  }

  async bytes (length: number): Promise<Buffer> {
    await this.#fill(length)
    const at = this.position - this.#windowStart
    this.position += length
    return this.#window.subarray(at, at + length)
  }

  async varint (): Promise<number> {
    let value = 0
    for (let shift = 0; shift < 63; shift += 7) {
      const byte = (await this.bytes(1))[0] as number
      value += (byte & 0x7f) * 2 ** shift
      if (byte < 0x80) return value
    }
    throw new Error('a number in it has no end')
  }
}

interface Field {
  readonly number: number
  readonly wire: number
  /** Of a length-delimited field. */
  readonly length: number
}

async function nextField (cursor: FileCursor): Promise<Field> {
  const tag = await cursor.varint()
  const wire = tag % 8
  return { number: Math.floor(tag / 8), wire, length: wire === 2 ? await cursor.varint() : 0 }
}

async function skip (cursor: FileCursor, field: Field): Promise<void> {
  if (field.wire === 0) await cursor.varint()
  else if (field.wire === 1) cursor.position += 8
  else if (field.wire === 2) cursor.position += field.length
  else if (field.wire === 5) cursor.position += 4
  else throw new Error(`wire type ${field.wire} is unknown`)
}

type Message = Map<number, Array<number | Buffer>>

/** A small message in memory: field number -> values. */
function parse (bytes: Buffer): Message {
  const fields: Message = new Map()
  let at = 0
  const varint = (): number => {
    let value = 0
    for (let shift = 0; at < bytes.length; shift += 7) {
      const byte = bytes[at++] as number
      value += (byte & 0x7f) * 2 ** shift
      if (byte < 0x80) return value
    }
    throw new Error('a number in it has no end')
  }
  while (at < bytes.length) {
    const tag = varint()
    const wire = tag % 8
    let value: number | Buffer
    if (wire === 0) {
      value = varint()
    } else {
      const length = wire === 2 ? varint() : wire === 1 ? 8 : 4
      value = bytes.subarray(at, at + length)
      at += length
    }
    const list = fields.get(Math.floor(tag / 8)) ?? []
    list.push(value)
    fields.set(Math.floor(tag / 8), list)
  }
  return fields
}

function child (message: Message, field: number): Message {
  const value = message.get(field)?.[0]
  return Buffer.isBuffer(value) ? parse(value) : new Map()
}

function toSpec (bytes: Buffer): TensorSpec {
  const info = parse(bytes)
  const name = String(info.get(1)?.[0] ?? '')
  const tensor = child(child(info, 2), 1)
  const element = Number(tensor.get(1)?.[0] ?? 0)
  const type = ELEMENT_TYPES[element]
  if (type === undefined) throw new Error(`"${name}" has element type ${element}, which engines do not use`)
  const dims = child(tensor, 2).get(1) ?? []
  const shape = dims.map((dim, index) => {
    const fields = parse(dim as Buffer)
    const value = fields.get(1)?.[0]
    return typeof value === 'number' ? value : String(fields.get(2)?.[0] ?? `dim${index}`)
  })
  return { name, type, shape }
}

async function readGraph (cursor: FileCursor, end: number): Promise<GraphSignature> {
  const inputs: TensorSpec[] = []
  const outputs: TensorSpec[] = []
  while (cursor.position < end) {
    const field = await nextField(cursor)
    if (field.wire === 2 && (field.number === 11 || field.number === 12)) {
      if (field.length > MAX_VALUE_INFO) throw new Error('an input is described by more than 1 MiB')
      const spec = toSpec(await cursor.bytes(field.length))
      if (field.number === 11) inputs.push(spec)
      else outputs.push(spec)
    } else {
      await skip(cursor, field)
    }
  }
  return { inputs, outputs }
}

/**
 * Inputs and outputs of an ONNX file.
 * @throws ModelError naming the file when it is no ONNX graph.
 */
export async function readGraphSignature (path: string): Promise<GraphSignature> {
  const file = await open(path, 'r')
  try {
    const { size } = await file.stat()
    const cursor = new FileCursor(file, size)
    while (cursor.position < size) {
      const field = await nextField(cursor)
      if (field.number === 7 && field.wire === 2) return await readGraph(cursor, cursor.position + field.length)
      await skip(cursor, field)
    }
    throw new Error('there is no graph in it')
  } catch (err) {
    throw new ModelError(`${path} is no usable ONNX file: ${(err as Error).message}`, { cause: err })
  } finally {
    await file.close()
  }
}
