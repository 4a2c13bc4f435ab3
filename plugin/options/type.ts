import type { JavaScriptTypeBuilder } from '@sinclair/typebox'

type Json = Readonly<Record<string, unknown>>

const optional = new WeakSet<object>()

const asOptional = (schema: Json): Json => {
  const copy = { ...schema }
  optional.add(copy)
  return copy
}

const object = (properties: Record<string, Json>, options: Json = {}): Json => {
  const required = Object.keys(properties).filter(name => !optional.has(properties[name]!))
  return { ...options, type: 'object', ...(required.length === 0 ? {} : { required }), properties }
}

const ofType = (type: string) => (options: Json = {}): Json => ({ ...options, type })

/**
 * The part of TypeBox's builder that the options use, with TypeBox's own types. TypeBox is 200 modules, which each start
 * of a gateway would load in 0.13 s CPU, to make the same plain objects.
 */
export const Type = {
  String: ofType('string'),
  Boolean: ofType('boolean'),
  Integer: ofType('integer'),
  Number: ofType('number'),
  Literal: (value: string, options: Json = {}): Json => ({ ...options, const: value, type: typeof value }),
  Array: (items: Json, options: Json = {}): Json => ({ ...options, type: 'array', items }),
  Union: (anyOf: readonly Json[], options: Json = {}): Json => ({ ...options, anyOf }),
  Object: object,
  Optional: asOptional,
  Partial: ({ type: _type, required: _required, properties, ...options }: Json, more: Json = {}): Json =>
    ({ ...object(Object.fromEntries(Object.entries(properties as Record<string, Json>).map(([name, schema]) => [name, asOptional(schema)])), options), ...more }),
  Unsafe: (schema: Json): Json => schema
} as unknown as Pick<JavaScriptTypeBuilder, 'String' | 'Boolean' | 'Integer' | 'Number' | 'Literal' | 'Array' | 'Union' | 'Object' | 'Optional' | 'Partial' | 'Unsafe'>
