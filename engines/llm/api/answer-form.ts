/** The form of an answer: `response_format`. */
import type { Node } from '../grammar/automaton.ts'
import { ANY_OBJECT } from '../grammar/json.ts'
import { schemaNode } from '../grammar/schema.ts'
import { isEmpty, isObject, readObject, refuse, unsupported, type Json } from './fields.ts'
import type { GenerationParams } from './sampling.ts'

/** What the text of an answer may be; undefined: any text. @throws EngineError naming the field at fault */
export function readForm ({ response_format: format }: Json): Node | undefined {
  if (isEmpty(format)) return undefined
  if (!isObject(format)) refuse('response_format', '"response_format" must be an object')
  switch (format.type) {
    case 'text': return undefined
    case 'json_object': return ANY_OBJECT
    case 'json_schema': {
      const { schema } = readObject(format.json_schema, 'response_format.json_schema')
      return schema === undefined || schema === null ? ANY_OBJECT : schemaNode(schema, 'response_format.json_schema.schema')
    }
    default: return unsupported('response_format.type', '"response_format" must have the type text, json_object or json_schema')
  }
}

/** An answer of a given form ends where it is whole. */
export function checkForm (form: Node | undefined, { sampling: { ignoreEos, minTokens } }: GenerationParams): void {
  if (form === undefined) return
  if (ignoreEos) refuse('ignore_eos', '"ignore_eos" must be false where the answer has a form')
  if (minTokens > 0) refuse('min_tokens', '"min_tokens" must be 0 where the answer has a form')
}
