/** Writes ONNX files without any dependency: enough protobuf for graphs of a few kinds of nodes and their weights. */
import { closeSync, openSync, writeSync } from 'node:fs'

export type ElementType = 'float32' | 'float16' | 'int64' | 'int32' | 'uint8' | 'bool'

const ELEMENT_CODES: Readonly<Record<ElementType, number>> = { float32: 1, uint8: 2, int32: 6, int64: 7, bool: 9, float16: 10 }

function varint (value: number): Buffer {
  const bytes: number[] = []
  let rest = BigInt.asUintN(64, BigInt(value))
  do {
    bytes.push(Number(rest & 0x7fn) | (rest > 0x7fn ? 0x80 : 0))
    rest >>= 7n
  } while (rest > 0n)
  return Buffer.from(bytes)
}

function field (number: number, value: number | string | Buffer): Buffer {
  if (typeof value === 'number') return Buffer.concat([varint(number * 8), varint(value)])
  const bytes = typeof value === 'string' ? Buffer.from(value) : value
  return Buffer.concat([varint(number * 8 + 2), varint(bytes.length), bytes])
}

function message (...fields: readonly Buffer[]): Buffer {
  return Buffer.concat(fields)
}

export interface Value {
  readonly name: string
  readonly type: ElementType
  readonly shape: ReadonlyArray<number | string>
}

export type Attribute = number | readonly number[] | string | { readonly float: number }

function attribute (name: string, value: Attribute): Buffer {
  if (typeof value === 'number') return message(field(1, name), field(3, value), field(20, 2))
  if (typeof value === 'string') return message(field(1, name), field(4, value), field(20, 3))
  if ('float' in value) {
    const bits = Buffer.alloc(4)
    bits.writeFloatLE(value.float)
    return message(field(1, name), varint(2 * 8 + 5), bits, field(20, 1))
  }
  return message(field(1, name), ...value.map(v => field(8, v)), field(20, 7))
}

function valueInfo ({ name, type, shape }: Value): Buffer {
  const dims = shape.map(d => field(1, typeof d === 'number' ? field(1, d) : field(2, d)))
  const tensor = message(field(1, ELEMENT_CODES[type]), field(2, message(...dims)))
  return message(field(1, name), field(2, field(1, tensor)))
}

export interface NodeOptions {
  readonly attributes?: Readonly<Record<string, Attribute>>
  /** Name of the output. */
  readonly output?: string
  /** How many outputs it has: `NAME`, `NAME.1`, `NAME.2`, ... */
  readonly outputs?: number
  /** Operator set: ONNX's own, or `com.microsoft`. */
  readonly domain?: string
}

/** A graph under construction; `save` writes it. */
export class GraphWriter {
  readonly #nodes: Buffer[] = []
  /** Heads and raw data in turn: weights are never copied, because they may be a gigabyte. */
  readonly #initializers: Buffer[] = []
  readonly #inputs: Buffer[] = []
  readonly #outputs: Buffer[] = []
  #count = 0

  input (value: Value): string {
    this.#inputs.push(field(11, valueInfo(value)))
    return value.name
  }

  output (value: Value, from: string): void {
    this.node('Identity', [from], { output: value.name })
    this.#outputs.push(field(12, valueInfo(value)))
  }

  weight (type: ElementType, dims: readonly number[], data: ArrayBufferView): string {
    const name = `w${this.#count++}`
    const raw = Buffer.from(data.buffer, data.byteOffset, data.byteLength)
    const head = message(...dims.map(d => field(1, d)), field(2, ELEMENT_CODES[type]), field(8, name), varint(9 * 8 + 2), varint(raw.length))
    this.#initializers.push(message(varint(5 * 8 + 2), varint(head.length + raw.length), head), raw)
    return name
  }

  ints (values: readonly number[]): string {
    return this.weight('int64', [values.length], BigInt64Array.from(values, BigInt))
  }

  /** Adds a node and returns the name of its (first) output. */
  node (op: string, inputs: readonly string[], options: NodeOptions = {}): string {
    const name = options.output ?? `t${this.#count++}`
    const outputs = [name, ...Array.from({ length: (options.outputs ?? 1) - 1 }, (_, i) => `${name}.${i + 1}`)]
    const attributes = Object.entries(options.attributes ?? {}).map(([key, value]) => field(5, attribute(key, value)))
    this.#nodes.push(field(1, message(...inputs.map(i => field(1, i)), ...outputs.map(o => field(2, o)), field(4, op), ...attributes, ...(options.domain === undefined ? [] : [field(7, options.domain)]))))
    return name
  }

  #pieces (): Buffer[] {
    const graph = [...this.#nodes, field(2, 'test'), ...this.#initializers, ...this.#inputs, ...this.#outputs]
    const length = graph.reduce((n, piece) => n + piece.length, 0)
    const opsets = [message(field(1, ''), field(2, 17)), message(field(1, 'com.microsoft'), field(2, 1))].map(opset => field(8, opset))
    return [field(1, 8), field(2, 'fastify-epd-test'), ...opsets, varint(7 * 8 + 2), varint(length), ...graph]
  }

  save (path: string): void {
    const file = openSync(path, 'w')
    try {
      for (const piece of this.#pieces()) writeSync(file, piece)
    } finally {
      closeSync(file)
    }
  }
}
