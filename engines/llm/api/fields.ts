/** Reading untrusted JSON: each reader names the member it refuses. */
import { MIGRATION_PROTOCOL } from '../../../adapters/wire/distserve.ts'
import { isObject, type Json } from '../../../adapters/wire/json.ts'
import { EngineError } from '../../service/errors.ts'
import type { RemoteBlocks } from '../sequence/prompt.ts'

export { isObject, type Json } from '../../../adapters/wire/json.ts'

/** What the caller sent is wrong. `param`: path of the member at fault, such as `messages[0].content[1]`. */
export function refuse (param: string, message: string): never {
  throw new EngineError('invalid_request', message, { param })
}

/** What the caller asks for is valid, but this engine can't do it. */
export function unsupported (param: string, message: string): never {
  throw new EngineError('unsupported', message, { param })
}

/** Absent, null, false, or an empty list or object. */
export function isEmpty (value: unknown): boolean {
  return value === undefined || value === null || value === false || (Array.isArray(value) && value.length === 0) || (isObject(value) && Object.keys(value).length === 0)
}

export function readObject (value: unknown, param: string, what = `"${param}"`): Json {
  if (!isObject(value)) refuse(param, `${what} must be an object`)
  return value
}

// Optional members of a request. Null counts as absent, as OpenAI defines it.

export function readNumber (body: Json, key: string, bounds: { min: number, max: number, fallback: number }): number {
  const value = body[key] ?? bounds.fallback
  if (typeof value !== 'number' || !(value >= bounds.min && value <= bounds.max)) {
    refuse(key, `"${key}" must be a number from ${bounds.min} to ${bounds.max}`)
  }
  return value
}

export function readInteger<F extends number | undefined> (body: Json, key: string, bounds: { min: number, max: number, fallback: F }): number | F {
  const value = body[key] ?? bounds.fallback
  if (value === undefined) return bounds.fallback
  if (!isInteger(value, bounds.min, bounds.max)) refuse(key, `"${key}" must be an integer from ${bounds.min} to ${bounds.max}`)
  return value
}

export function readBoolean (body: Json, key: string, fallback: boolean): boolean {
  const value = body[key] ?? fallback
  if (typeof value !== 'boolean') refuse(key, `"${key}" must be true or false`)
  return value
}

/** A string or a list of strings, none of them empty. */
export function readStrings (body: Json, key: string, max: number): string[] {
  const value = body[key] ?? []
  const list = Array.isArray(value) ? value as unknown[] : [value]
  if (list.length > max) refuse(key, `"${key}" must hold at most ${max} strings`)
  if (!list.every((s): s is string => typeof s === 'string' && s !== '')) refuse(key, `"${key}" must be a non-empty string or a list of them`)
  return list
}

// Required members of what another engine answered. `path`: path of `entry` in the body.

const MAX_TEXT = 2048

export function requireText (entry: Json, key: string, path: string): string {
  const value = entry[key]
  if (typeof value !== 'string' || value === '' || value.length > MAX_TEXT) refuse(`${path}.${key}`, `"${key}" must be a non-empty string of at most ${MAX_TEXT} characters`)
  return value
}

/** An integer from `min` to `max`. */
export function requireInteger (entry: Json, key: string, path: string, { min = 0, max = Number.MAX_SAFE_INTEGER } = {}): number {
  const value = entry[key]
  if (!isInteger(value, min, max)) refuse(`${path}.${key}`, `"${key}" must be an integer from ${min} to ${max}`)
  return value
}

/** A list of at most `length` integers from 0 to `max`. */
export function requireIntegers (entry: Json, key: string, path: string, { length = 65_536, max = Number.MAX_SAFE_INTEGER } = {}): number[] {
  const value = entry[key]
  const valid = Array.isArray(value) && value.length <= length && value.every(v => isInteger(v, 0, max))
  if (!valid) refuse(`${path}.${key}`, `"${key}" must be a list of at most ${length} integers from 0 to ${max}`)
  return value as number[]
}

/** A list of at most `length` members, each read by `read` with its own path. */
export function requireList<T> (entry: Json, key: string, path: string, length: number, read: (value: unknown, path: string) => T): T[] {
  const value = entry[key]
  if (!Array.isArray(value) || value.length > length) refuse(`${path}.${key}`, `"${key}" must be a list of at most ${length} members`)
  return (value as unknown[]).map((member, i) => read(member, `${path}.${key}[${i}]`))
}

/** The members that name blocks; encoder results and migration requests have the same. */
export function requireRemoteBlocks (entry: Json, path: string): RemoteBlocks {
  const { tcp } = MIGRATION_PROTOCOL
  if (entry.protocol !== undefined && entry.protocol !== tcp) refuse(`${path}.protocol`, `"protocol" must be ${tcp} (TCP)`)
  return {
    engineId: requireText(entry, 'remote_engine_id', path),
    epoch: requireInteger(entry, 'epoch', path),
    lease: requireText(entry, 'lease', path),
    blocks: requireIntegers(entry, 'remote_block_ids', path)
  }
}

function isInteger (value: unknown, min: number, max: number): value is number {
  return Number.isSafeInteger(value) && (value as number) >= min && (value as number) <= max
}
