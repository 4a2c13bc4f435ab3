/** Reading JSON that came over the network: nothing about its shape is known. */

export type Json = Readonly<Record<string, unknown>>

export function isObject (value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** The value when it is an object, else an object without members. */
export function objectOf (value: unknown): Json {
  return isObject(value) ? value : {}
}

export function textOf (value: unknown): string | undefined {
  return typeof value === 'string' ? value : undefined
}

export function numberOf (value: unknown): number | undefined {
  return typeof value === 'number' ? value : undefined
}

export function listOf (value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : []
}
