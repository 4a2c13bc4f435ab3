/**
 * The JSON schemas that answers can be held to. What is written under a schema is valid under it; not everything that is valid
 * is written: members come in the schema's order, and others only where `additionalProperties` asks for them. A keyword that
 * could not be kept is refused by name.
 */
import { choice, later, words, type Node } from './automaton.ts'
import { ANY, ANY_LIST, ANY_OBJECT, FORMATS, INTEGER, integers, list, NUMBER, numbers, object, string, tuple } from './json.ts'
import { isObject, type Json } from '../../../adapters/wire/json.ts'
import { EngineError } from '../../service/errors.ts'

const MAX_SCHEMAS = 1_000
const MAX_VALUES = 1_000
/** Of names and values: each takes some 300 bytes. */
const MAX_CHARACTERS = 30_000
const MAX_DEPTH = 64
/** Each may be the next member, so each is a way to go on. */
const MAX_OPTIONAL = 100
const MAX_PARAM = 200

const ANNOTATIONS = ['title', 'description', 'default', 'examples', 'deprecated', 'readOnly', 'writeOnly', '$comment', '$schema', '$id', '$defs', 'definitions']
const BY_TYPE = {
  object: ['properties', 'required', 'additionalProperties'],
  array: ['items', 'prefixItems', 'minItems', 'maxItems'],
  string: ['minLength', 'maxLength', 'format'],
  number: ['minimum', 'maximum'],
  integer: ['minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum'],
  boolean: [],
  null: []
} as const satisfies Record<string, readonly string[]>
type Type = keyof typeof BY_TYPE
const TYPES = Object.keys(BY_TYPE) as Type[]
/** Keywords that say everything: none but annotations, and a type, stands beside them. */
const WHOLE = ['$ref', 'anyOf', 'allOf', 'enum', 'const']
const KNOWN = new Set<string>([...ANNOTATIONS, 'type', ...WHOLE, ...Object.values(BY_TYPE).flat()])

/** `param`: the schema's place in the body. @throws EngineError `invalid_request`, or `unsupported` naming the keyword */
export function schemaNode (schema: unknown, param: string): Node {
  return new Compiler(schema).compile(schema, { param, depth: 0, chain: [] })
}

/** Where a schema stands. `chain`: the schemas that consist of this one alone, with no list or object between. */
interface Place {
  readonly param: string
  readonly depth: number
  readonly chain: readonly unknown[]
}

function refuse ({ param }: Place, keyword: string | undefined, message: string): never {
  throw new EngineError('invalid_request', message, { param: at(param, keyword) })
}

function unsupported ({ param }: Place, keyword: string, message = 'is not supported by this engine'): never {
  throw new EngineError('unsupported', `the JSON schema keyword "${keyword.slice(0, 60)}" ${message}`, { param: at(param, keyword) })
}

const at = (param: string, keyword: string | undefined): string => (keyword === undefined ? param : `${param}.${keyword}`).slice(0, MAX_PARAM)
const within = ({ param, depth }: Place, name: string): Place => ({ param: at(param, name), depth: depth + 1, chain: [] })

class Compiler {
  readonly #root: unknown
  readonly #nodes = new Map<unknown, Node>()
  #schemas = 0
  #values = 0
  #characters = 0

  constructor (root: unknown) {
    this.#root = root
  }

  compile (schema: unknown, place: Place): Node {
    if (schema === true) return ANY
    if (schema === false) return refuse(place, undefined, 'no value is valid under the schema false')
    if (!isObject(schema)) return refuse(place, undefined, 'a JSON schema must be an object')
    if (place.depth > MAX_DEPTH) refuse(place, undefined, `the JSON schema is nested deeper than ${MAX_DEPTH}`)
    if (place.chain.includes(schema)) refuse(place, undefined, 'the JSON schema refers to itself without an object or a list between')
    const known = this.#nodes.get(schema)
    if (known !== undefined) return known
    if (++this.#schemas > MAX_SCHEMAS) refuse(place, undefined, `the JSON schema has more than ${MAX_SCHEMAS} schemas in it`)
    const node = later()
    this.#nodes.set(schema, node)
    const chain = [...place.chain, schema]
    for (const keyword of Object.keys(schema)) if (!KNOWN.has(keyword)) unsupported(place, keyword)
    node.node = this.#value(schema, { ...place, chain })
    return node
  }

  #value (schema: Json, place: Place): Node {
    const types = typesOf(schema, place)
    const whole = WHOLE.filter(keyword => schema[keyword] !== undefined)
    if (whole.length === 0) return choice(...(types ?? inferred(schema)).map(type => this.#typed(type, schema, place)))
    const keyword = whole[0] as string
    const beside = whole[1] ?? Object.values(BY_TYPE).flat().find(other => schema[other] !== undefined)
    if (beside !== undefined) unsupported(place, keyword, `is not supported beside "${beside}"`)
    const deeper = { ...place, depth: place.depth + 1 }
    if (keyword === 'enum' || keyword === 'const') return this.#enum(keyword === 'const' ? [schema.const] : schema.enum, types, place, keyword)
    if (types !== undefined) unsupported(place, keyword, 'is not supported beside "type"')
    if (keyword === '$ref') return this.compile(this.#resolve(schema.$ref, place), { ...deeper, param: at(place.param, '$ref') })
    const all = schema[keyword]
    if (!Array.isArray(all) || all.length === 0) refuse(place, keyword, `"${keyword}" must be a non-empty list`)
    if (keyword === 'allOf' && all.length > 1) unsupported(place, keyword, 'is supported with one schema only')
    return choice(...all.map((one, i) => this.compile(one, { ...deeper, param: at(place.param, `${keyword}[${i}]`) })))
  }

  #typed (type: Type, schema: Json, place: Place): Node {
    switch (type) {
      case 'object': return this.#object(schema, place)
      case 'array': return this.#array(schema, place)
      case 'string': return this.#string(schema, place)
      case 'number':
      case 'integer': return this.#number(type, schema, place)
      case 'boolean': return words('true', 'false')
      case 'null': return words('null')
    }
  }

  #object (schema: Json, place: Place): Node {
    const { properties = {}, required = [], additionalProperties: others } = schema
    if (!isObject(properties)) refuse(place, 'properties', '"properties" must be an object')
    if (!Array.isArray(required) || !required.every(name => typeof name === 'string')) refuse(place, 'required', '"required" must be a list of names')
    const names = new Set([...Object.keys(properties), ...required])
    const needed = new Set(required)
    if (names.size === 0 && (others === undefined || others === true)) return ANY_OBJECT
    this.#count([...names], place)
    let optional = 0
    const members = [...names].flatMap(name => {
      const value = Object.hasOwn(properties, name) ? properties[name] : others ?? true
      if (value === false && !needed.has(name)) return []
      optional = needed.has(name) ? 0 : optional + 1
      if (optional > MAX_OPTIONAL) unsupported(place, 'properties', `is supported with at most ${MAX_OPTIONAL} optional properties in a row`)
      return [{ name, value: this.compile(value, within(place, `properties.${name}`)), required: needed.has(name) }]
    })
    const other = others === undefined || others === false ? undefined : this.compile(others, within(place, 'additionalProperties'))
    return object(members, other)
  }

  #array (schema: Json, place: Place): Node {
    const { items, prefixItems } = schema
    const [min, max] = [limit(schema, 'minItems', place) ?? 0, limit(schema, 'maxItems', place) ?? Infinity]
    if (prefixItems !== undefined) {
      if (!Array.isArray(prefixItems)) refuse(place, 'prefixItems', '"prefixItems" must be a list')
      if (prefixItems.length < min || prefixItems.length > max) unsupported(place, 'prefixItems', 'is supported only where a list of exactly these items is valid')
      return tuple(prefixItems.map((item, i) => this.compile(item, within(place, `prefixItems[${i}]`))))
    }
    if (min > max) refuse(place, 'minItems', '"minItems" is above "maxItems"')
    if (max === 0 || items === false) return min === 0 ? words('[]') : refuse(place, 'items', 'no list is valid under this schema')
    if (items === undefined && min === 0 && max === Infinity) return ANY_LIST
    return list(items === undefined ? ANY : this.compile(items, within(place, 'items')), min, max)
  }

  #string (schema: Json, place: Place): Node {
    const { format } = schema
    const [min, max] = [limit(schema, 'minLength', place) ?? 0, limit(schema, 'maxLength', place) ?? Infinity]
    if (min > max) refuse(place, 'minLength', '"minLength" is above "maxLength"')
    if (format === undefined) return string(min, max)
    const node = typeof format === 'string' ? FORMATS.get(format) : refuse(place, 'format', '"format" must be a string')
    if (node === undefined) unsupported(place, 'format', `is supported with ${[...FORMATS.keys()].join(', ')} only`)
    if (min > 0 || max < Infinity) unsupported(place, 'format', 'is not supported beside a length')
    return node
  }

  #number (type: 'number' | 'integer', schema: Json, place: Place): Node {
    const bound = (keyword: string): number | undefined => {
      const value = schema[keyword]
      if (value !== undefined && (typeof value !== 'number' || !Number.isFinite(value))) refuse(place, keyword, `"${keyword}" must be a number`)
      return value
    }
    const [min, max, above, below] = [bound('minimum'), bound('maximum'), bound('exclusiveMinimum'), bound('exclusiveMaximum')]
    if (type === 'number') {
      const exclusive = above !== undefined ? 'exclusiveMinimum' : below !== undefined ? 'exclusiveMaximum' : undefined
      if (exclusive !== undefined) unsupported(place, exclusive, 'is supported with integers only')
    }
    if (min === undefined && max === undefined && above === undefined && below === undefined) return type === 'integer' ? INTEGER : NUMBER
    const low = Math.max(min ?? -Infinity, above === undefined ? -Infinity : Math.floor(above) + 1)
    const high = Math.min(max ?? Infinity, below === undefined ? Infinity : Math.ceil(below) - 1)
    return (type === 'integer' ? integers : numbers)(low, high) ?? refuse(place, undefined, `there is no ${type} from ${low} to ${high} that this engine writes`)
  }

  #enum (values: unknown, types: readonly Type[] | undefined, place: Place, keyword: string): Node {
    if (!Array.isArray(values) || values.length === 0) refuse(place, keyword, `"${keyword}" must be a non-empty list`)
    this.#values += values.length
    if (this.#values > MAX_VALUES) refuse(place, keyword, `the JSON schema has more than ${MAX_VALUES} enum values`)
    const valid = values.filter(value => types === undefined || types.some(type => isA(type, value)))
    if (valid.length === 0) refuse(place, keyword, `no value of "${keyword}" is of the type`)
    const texts = valid.map(value => isFlat(value) ? JSON.stringify(value) : unsupported(place, keyword, 'is not supported with objects or lists in it'))
    this.#count(texts, place)
    return words(...texts)
  }

  #count (texts: readonly string[], place: Place): void {
    for (const text of texts) this.#characters += text.length
    if (this.#characters > MAX_CHARACTERS) refuse(place, undefined, `the JSON schema has more than ${MAX_CHARACTERS} characters of names and values`)
  }

  /** A pointer into the schema itself. */
  #resolve (ref: unknown, place: Place): unknown {
    if (typeof ref !== 'string') return refuse(place, '$ref', '"$ref" must be a string')
    if (ref !== '#' && !ref.startsWith('#/')) unsupported(place, '$ref', 'is supported within the schema only: "#", "#/$defs/..."')
    let found: unknown = this.#root
    for (const part of ref.split('/').slice(1, MAX_DEPTH)) {
      const name = decoded(part).replaceAll('~1', '/').replaceAll('~0', '~')
      const holder: unknown = found
      found = typeof holder === 'object' && holder !== null && Object.hasOwn(holder, name) ? (holder as Json)[name] : undefined
    }
    return found ?? refuse(place, '$ref', `"$ref": ${JSON.stringify(ref.slice(0, 100))} is not in the schema`)
  }
}

function decoded (text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text
  }
}

function typesOf ({ type }: Json, place: Place): readonly Type[] | undefined {
  if (type === undefined) return undefined
  const all = Array.isArray(type) ? [...new Set(type)] : [type]
  if (all.length === 0 || !all.every(one => TYPES.includes(one as Type))) refuse(place, 'type', `"type" must be one of ${TYPES.join(', ')}, or a list of them`)
  return all as Type[]
}

/** Without a type: the one that the keywords are for, or any. */
function inferred (schema: Json): readonly Type[] {
  const found = TYPES.find(type => type !== 'integer' && BY_TYPE[type].some(keyword => schema[keyword] !== undefined))
  return found !== undefined ? [found] : ['object', 'array', 'string', 'number', 'boolean', 'null']
}

function limit (schema: Json, keyword: string, place: Place): number | undefined {
  const value = schema[keyword]
  if (value === undefined) return undefined
  return Number.isSafeInteger(value) && (value as number) >= 0 ? value as number : refuse(place, keyword, `"${keyword}" must be a natural number`)
}

const isFlat = (value: unknown): boolean => typeof value !== 'object' || value === null

function isA (type: Type, value: unknown): boolean {
  switch (type) {
    case 'null': return value === null
    case 'array': return Array.isArray(value)
    case 'object': return isObject(value)
    case 'integer': return Number.isInteger(value)
    case 'number': return typeof value === 'number'
    case 'string': return typeof value === 'string'
    case 'boolean': return typeof value === 'boolean'
  }
}
