/** Reading numbers out of a model's JSON files, with errors that name file and field. */
import { isObject } from '../../adapters/wire/json.ts'
import { ModelError, type Json } from './family.ts'

export function object (source: Json, key: string, file: string): Json {
  const value = source[key]
  if (!isObject(value)) throw new ModelError(`${file}: "${key}" must be an object`)
  return value
}

/** A positive integer; `fallback` when the field is absent or null. */
export function positiveInteger (source: Json, key: string, file: string, fallback?: number): number {
  const value = source[key] ?? fallback
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 1) throw new ModelError(`${file}: "${key}" must be a positive integer`)
  return value
}

export function finite (source: Json, key: string, file: string, fallback: number): number {
  const value = source[key] ?? fallback
  if (typeof value !== 'number' || !Number.isFinite(value)) throw new ModelError(`${file}: "${key}" must be a number`)
  return value
}

/** Three numbers, one a colour channel. */
export function perChannel (source: Json, key: string, file: string, fallback: readonly [number, number, number]): readonly [number, number, number] {
  const value = source[key] ?? fallback
  if (!Array.isArray(value) || value.length !== 3 || !value.every(v => typeof v === 'number' && Number.isFinite(v))) {
    throw new ModelError(`${file}: "${key}" must be three numbers`)
  }
  return value as unknown as readonly [number, number, number]
}

export function flag (source: Json, key: string, fallback: boolean): boolean {
  const value = source[key]
  return typeof value === 'boolean' ? value : fallback
}

/** A width and height given as `{height, width}`, `[h, w]`, `{shortest_edge}`, `{longest_edge}` or one number. */
export function pictureSize (value: unknown): { width: number, height: number } | undefined {
  if (typeof value === 'number') return { width: value, height: value }
  if (Array.isArray(value)) return { height: Number(value[0]), width: Number(value[1] ?? value[0]) }
  if (!isObject(value)) return undefined
  const { height, width, shortest_edge: shortest, longest_edge: longest } = value
  const edge = shortest ?? longest
  if (typeof height === 'number' && typeof width === 'number') return { width, height }
  return typeof edge === 'number' ? { width: edge, height: edge } : undefined
}

/** One id or a list of them. */
export function tokenIds (value: unknown): number[] {
  const list = Array.isArray(value) ? value : [value]
  return list.filter((id): id is number => typeof id === 'number' && Number.isSafeInteger(id) && id >= 0)
}
