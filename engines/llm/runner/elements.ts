import { fromFloat16 } from '../../runtime/float16.ts'
import type { Session, TensorData } from '../../runtime/types.ts'

/** Element types of features, keys and values; float16 as its bits. */
export type ElementType = 'float32' | 'float16'
export type Elements = Float32Array | Uint16Array

export function bytesOf (type: ElementType): 2 | 4 {
  return type === 'float16' ? 2 : 4
}

export function newElements (type: ElementType, length: number): Elements {
  return type === 'float16' ? new Uint16Array(length) : new Float32Array(length)
}

export function elementsOver (type: ElementType, sab: SharedArrayBuffer): Elements {
  return type === 'float16' ? new Uint16Array(sab) : new Float32Array(sab)
}

/** Copies a few elements; for so few a loop is faster than making two views. */
export function copyElements (from: Elements, at: number, into: Elements, to: number, count: number): void {
  for (let i = 0; i < count; i++) into[to + i] = from[at + i] as number
}

export function tensor (type: ElementType, data: Elements, dims: readonly number[]): TensorData {
  return type === 'float16' ? { type, data: data as Uint16Array, dims } : { type, data: data as Float32Array, dims }
}

/** The element type of an input or output. @throws when the graph lacks it or has another type there. */
export function elementTypeOf (session: Session, side: 'inputs' | 'outputs', name: string): ElementType {
  const type = session[side].find(spec => spec.name === name)?.type
  if (type === 'float32' || type === 'float16') return type
  throw new Error(`the graph's ${side} lack a float32 or float16 "${name}"`)
}

/** Row `row` of `[rows, width]` logits as float32; a view if they are float32 already. */
export function floatRow (data: TensorData['data'], row: number, width: number): Float32Array {
  const part = data.subarray(row * width, (row + 1) * width)
  if (part instanceof Float32Array) return part
  return Float32Array.from(part as Uint16Array, fromFloat16)
}
