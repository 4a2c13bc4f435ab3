/** The tools of a request: what the model may call, must call, and how its calls are held to their schemas. */
import { choice, free, repeat, sequence, words, type Node } from '../grammar/automaton.ts'
import { ANY_OBJECT, object } from '../grammar/json.ts'
import { schemaNode } from '../grammar/schema.ts'
import type { TemplateMessage } from '../text/chat-template.ts'
import { CLOSE, OPEN, type ToolFormat } from '../text/tool-calls.ts'
import { isEmpty, isObject, readBoolean, readObject, refuse, unsupported, type Json } from './fields.ts'

interface Tool {
  readonly param: string
  readonly name: string
  readonly parameters: Json | undefined
  /** Its arguments are held to `parameters` also where the model chooses to call it. */
  readonly strict: boolean
}

export interface Tools {
  /** As the client wrote them: templates show them to the model. */
  readonly given: readonly unknown[]
  readonly tools: readonly Tool[]
  /** `named`: the first one is called, once. */
  readonly choice: 'auto' | 'required' | 'named'
  readonly parallel: boolean
}

const MAX_TOOLS = 128
/** Calls of one answer, where the model must call. */
const MAX_CALLS = 16
const NAME = /^[\w-]{1,64}$/
/** Of the tools and of calls in messages: templates print them with functions that call themselves. */
const MAX_DEPTH = 64
const MAX_VALUES = 20_000

/** Undefined when the model may call nothing: it is shown no tools then. @throws EngineError naming the field */
export function readTools (body: Json): Tools | undefined {
  const { tools: given, tool_choice: wanted } = body
  const parallel = readBoolean(body, 'parallel_tool_calls', true)
  if (isEmpty(given)) {
    if (!isEmpty(wanted) && wanted !== 'none' && wanted !== 'auto') refuse('tool_choice', '"tool_choice" needs "tools"')
    return undefined
  }
  if (!Array.isArray(given) || given.length > MAX_TOOLS) refuse('tools', `"tools" must be a list of at most ${MAX_TOOLS} tools`)
  checkSize(given, 'tools')
  const tools = (given as unknown[]).map((tool, i) => readTool(tool, `tools[${i}]`))
  const twice = tools.find((tool, i) => tools.findIndex(other => other.name === tool.name) !== i)
  if (twice !== undefined) refuse(twice.param, 'two tools have the same name')
  if (wanted === 'none') return undefined
  if (!isEmpty(body.response_format) && (body.response_format as Json).type !== 'text') unsupported('response_format', '"response_format" is not supported beside tools')
  if (isEmpty(wanted) || wanted === 'auto' || wanted === 'required') return { given, tools, choice: wanted === 'required' ? 'required' : 'auto', parallel }
  const name = isObject(wanted) && wanted.type === 'function' && isObject(wanted.function) ? wanted.function.name : refuse('tool_choice', '"tool_choice" must be none, auto, required or name a function')
  const named = tools.find(tool => tool.name === name) ?? refuse('tool_choice.function.name', '"tool_choice" names none of the tools')
  return { given, tools: [named], choice: 'named', parallel: false }
}

function readTool (tool: unknown, param: string): Tool {
  if (!isObject(tool)) refuse(param, 'a tool must be an object')
  if (tool.type !== 'function') unsupported(`${param}.type`, 'tools must have the type "function"')
  const described = readObject(tool.function, `${param}.function`)
  const { name, parameters } = described
  if (typeof name !== 'string' || !NAME.test(name)) refuse(`${param}.function.name`, 'the name of a function is 1 to 64 letters, digits, "_" and "-"')
  if (!isEmpty(parameters) && !isObject(parameters)) refuse(`${param}.function.parameters`, '"parameters" must be a JSON schema')
  return { param: `${param}.function.parameters`, name, parameters: isEmpty(parameters) ? undefined : parameters as Json, strict: readBoolean(described, 'strict', false) }
}

/** With a list of what is left to look at: what is nested too deep can't be walked by calls. */
export function checkSize (value: unknown, param: string): void {
  const left: Array<[value: unknown, depth: number]> = [[value, 0]]
  for (let next = left.pop(), count = 0; next !== undefined; next = left.pop()) {
    const [one, depth] = next
    if (depth > MAX_DEPTH) refuse(param, `"${param}" is nested deeper than ${MAX_DEPTH}`)
    if (++count > MAX_VALUES) refuse(param, `"${param}" holds more than ${MAX_VALUES} values`)
    if (typeof one !== 'object' || one === null) continue
    if (Array.isArray(one) && one.length > MAX_VALUES) refuse(param, `"${param}" holds more than ${MAX_VALUES} values`)
    for (const member of Object.values(one)) left.push([member, depth + 1])
  }
}

/** What the answer's text may be. @throws EngineError where the model does not write what is asked for */
export function toolForm ({ tools, choice: wanted, parallel }: Tools, format: ToolFormat): Node | undefined {
  if (format === 'none') unsupported('tools', 'this model\'s chat template has no tools')
  if (wanted === 'auto' && !tools.some(tool => tool.strict)) return undefined
  if (format === 'other') unsupported(wanted === 'auto' ? 'tools' : 'tool_choice', 'this model writes its calls in a way that this engine does not read: tools work with "tool_choice": "auto", without "strict", and its calls stay text')
  const call = sequence(words('\n'), choice(...tools.map(tool => callNode(tool, wanted !== 'auto'))), words(`\n${CLOSE}`))
  if (wanted === 'auto') return free(OPEN, call)
  const tagged = sequence(words(OPEN), call)
  return parallel ? sequence(tagged, repeat(sequence(words('\n'), tagged), 0, MAX_CALLS - 1)) : tagged
}

function callNode ({ name, parameters, strict, param }: Tool, forced: boolean): Node {
  const node = parameters === undefined ? object([], undefined) : strict || forced ? schemaNode(parameters, param) : ANY_OBJECT
  return sequence(words(`{"name": ${JSON.stringify(name)}, "arguments": `), node, words('}'))
}

/** @throws EngineError where messages hold calls, or their results, that the template does not show */
export function checkMessages (messages: readonly TemplateMessage[], format: ToolFormat): void {
  const at = format === 'none' ? messages.findIndex(({ role, tool_calls: calls }) => role === 'tool' || calls !== undefined) : -1
  if (at >= 0) unsupported(`messages[${at}]`, 'this model\'s chat template has no tools')
}
