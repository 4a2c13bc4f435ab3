/**
 * Reads an OTLP trace export in protobuf into the shape of its JSON, as far as the trace store needs it. vLLM's exporter,
 * and the OpenTelemetry Collector's unless told otherwise, send no JSON.
 *
 * @see https://github.com/open-telemetry/opentelemetry-proto/blob/main/opentelemetry/proto/trace/v1/trace.proto
 * @see https://protobuf.dev/programming-guides/encoding/
 */

type Kind = 'text' | 'hex' | 'bool' | 'number' | 'int64' | 'fixed64' | 'double'
interface Field { readonly name: string, readonly as: Kind | Message, readonly many?: true }
/** By field number. Others are passed over. */
type Message = Readonly<Record<number, Field>>

const SCALAR: Message = {
  1: { name: 'stringValue', as: 'text' },
  2: { name: 'boolValue', as: 'bool' },
  3: { name: 'intValue', as: 'int64' },
  4: { name: 'doubleValue', as: 'double' }
}
const VALUE: Message = { ...SCALAR, 5: { name: 'arrayValue', as: { 1: { name: 'values', as: SCALAR, many: true } } } }
const ATTRIBUTES: Field = { name: 'attributes', as: { 1: { name: 'key', as: 'text' }, 2: { name: 'value', as: VALUE } }, many: true }
const SPAN: Message = {
  1: { name: 'traceId', as: 'hex' },
  2: { name: 'spanId', as: 'hex' },
  4: { name: 'parentSpanId', as: 'hex' },
  5: { name: 'name', as: 'text' },
  6: { name: 'kind', as: 'number' },
  7: { name: 'startTimeUnixNano', as: 'fixed64' },
  8: { name: 'endTimeUnixNano', as: 'fixed64' },
  9: ATTRIBUTES,
  15: { name: 'status', as: { 2: { name: 'message', as: 'text' }, 3: { name: 'code', as: 'number' } } }
}
const EXPORT: Message = {
  1: {
    name: 'resourceSpans',
    as: {
      1: { name: 'resource', as: { 1: ATTRIBUTES } },
      2: { name: 'scopeSpans', as: { 2: { name: 'spans', as: SPAN, many: true } }, many: true }
    },
    many: true
  }
}

/** A message of two bytes becomes an object: 4 MiB of them must not become a gigabyte. */
const MAX_MESSAGES = 300_000

/** @throws Error where the bytes are no protobuf */
export function readProtobufTraces (bytes: Buffer): unknown {
  return { resourceSpans: [], ...new Reader(bytes).message(EXPORT, bytes.length) }
}

class Reader {
  readonly #bytes: Buffer
  #at = 0
  #messages = 0

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  message (schema: Message, end: number): Record<string, unknown> {
    if (++this.#messages > MAX_MESSAGES) throw new Error('too many messages')
    const message: Record<string, unknown> = {}
    while (this.#at < end) {
      const tag = this.#varint()
      const field = schema[Math.floor(tag / 8)]
      const value = this.#value(tag % 8, field?.as)
      if (field === undefined) continue
      if (field.many === undefined) message[field.name] = value
      else ((message[field.name] ??= []) as unknown[]).push(value)
    }
    if (this.#at !== end) throw new Error('a field is longer than its message')
    return message
  }

  /** @param as undefined: read over */
  #value (wire: number, as: Field['as'] | undefined): unknown {
    if (wire === 0) return as === 'int64' ? this.#int64() : as === 'bool' ? this.#varint() !== 0 : this.#varint()
    if (wire === 1) {
      const at = this.#take(8)
      return as === 'double' ? this.#bytes.readDoubleLE(at) : String(this.#bytes.readBigUInt64LE(at))
    }
    if (wire === 5) return this.#bytes.readUInt32LE(this.#take(4))
    if (wire !== 2) throw new Error(`unknown wire type ${wire}`)
    const length = this.#varint()
    const at = this.#take(length)
    if (as === undefined) return undefined
    if (typeof as !== 'object') return this.#bytes.toString(as === 'hex' ? 'hex' : 'utf8', at, at + length)
    this.#at = at
    return this.message(as, at + length)
  }

  /** @returns where so many bytes begin */
  #take (length: number): number {
    if (length > this.#bytes.length - this.#at) throw new Error('the body ends within a field')
    this.#at += length
    return this.#at - length
  }

  /** Exact up to 2^53, which lengths, tags and enumerations are below. */
  #varint (): number {
    let value = 0
    for (let scale = 1; scale < 2 ** 70; scale *= 128) {
      const byte = this.#bytes[this.#at++]
      if (byte === undefined) throw new Error('the body ends within a field')
      value += (byte & 0x7f) * scale
      if (byte < 0x80) return value
    }
    throw new Error('a number is longer than 64 bits')
  }

  #int64 (): string {
    const start = this.#at
    this.#varint()
    let value = 0n
    for (let at = this.#at - 1; at >= start; at--) value = value << 7n | BigInt(this.#bytes[at]! & 0x7f)
    return String(BigInt.asIntN(64, value))
  }
}
