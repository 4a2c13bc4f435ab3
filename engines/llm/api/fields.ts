/** Reading an untrusted JSON object: each reader names the field it refuses. Null is as good as absent, as OpenAI has it. */
import { EngineError } from '../../service/errors.ts'

export type Body = Readonly<Record<string, unknown>>

export function refuse (param: string, message: string): never {
  throw new EngineError('invalid_request', message, { param })
}

export function isObject (value: unknown): value is Body {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** Absent, null, false, or an empty list or object: as if it were not there. */
export function isEmpty (value: unknown): boolean {
  return value === undefined || value === null || value === false || (Array.isArray(value) && value.length === 0) || (isObject(value) && Object.keys(value).length === 0)
}

export function readObject (value: unknown, param: string): Body {
  if (!isObject(value)) refuse(param, `"${param}" must be an object`)
  return value
}

export function readNumber (body: Body, key: string, bounds: { min: number, max: number, fallback: number }): number {
  const value = body[key] ?? bounds.fallback
  if (typeof value !== 'number' || !(value >= bounds.min && value <= bounds.max)) {
    refuse(key, `"${key}" must be a number from ${bounds.min} to ${bounds.max}`)
  }
  return value
}

export function readInteger<F extends number | undefined> (body: Body, key: string, bounds: { min: number, max: number, fallback: F }): number | F {
  const value = body[key] ?? bounds.fallback
  if (value === undefined) return bounds.fallback
  if (!Number.isSafeInteger(value) || (value as number) < bounds.min || (value as number) > bounds.max) {
    refuse(key, `"${key}" must be an integer from ${bounds.min} to ${bounds.max}`)
  }
  return value as number
}

export function readBoolean (body: Body, key: string, fallback: boolean): boolean {
  const value = body[key] ?? fallback
  if (typeof value !== 'boolean') refuse(key, `"${key}" must be true or false`)
  return value
}

/** A string or a list of strings, none of them empty. */
export function readStrings (body: Body, key: string, max: number): string[] {
  const value = body[key] ?? []
  const list = Array.isArray(value) ? value as unknown[] : [value]
  if (list.length > max) refuse(key, `"${key}" must hold at most ${max} strings`)
  if (!list.every((s): s is string => typeof s === 'string' && s !== '')) refuse(key, `"${key}" must be a non-empty string or a list of them`)
  return list
}

/** @throws EngineError naming the first member that is not in `known`. */
export function refuseUnknown (body: Body, known: ReadonlySet<string>): void {
  for (const key of Object.keys(body)) {
    if (!known.has(key)) refuse(key.slice(0, 100), `unknown field "${key.slice(0, 100)}"`)
  }
}
