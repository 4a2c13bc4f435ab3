/** Is what came an answer? Before its head goes to a client, another node can still give one. */
import { Readable } from 'node:stream'
import { AdapterError, type AdapterNode, type Call, type UpstreamResponse } from '../adapter.ts'
import { isErrorBody } from './error-shape.ts'
import { brokenOff, codeOf, decode, failureError, failureOf, nonsense, readFailure, type FailureReader } from './failures.ts'
import type { FlowingResponse } from '../flow.ts'

/** Routes whose answers are known to be JSON, or events; others may answer with anything but a page. */
const GENERATES = /^\/v1\/(chat\/completions|completions|responses|messages|embeddings)(\?|$)/
const CHOICES = /^\/v1\/(chat\/completions|completions)(\?|$)/
/** Above, only both ends of an answer are looked at, in bytes. */
const PARSE_LIMIT = 64 * 1024

const OPEN = 0x7b
const CLOSE = 0x7d
const SPACE = 0x20
const BYTE_ORDER_MARK = Buffer.from('\ufeff')

/** Longest answer that is held until all of it is there, in bytes. */
const HELD_LIMIT = 1024 * 1024
/** Longest that it may be when decoded. */
const DECODED_LIMIT = 4 * HELD_LIMIT
/** A first event longer than this is taken for a good one, in bytes. */
const FIRST_EVENT_LIMIT = 64 * 1024

/** What is wrong with an answer: it is none, or it is an error. Undefined: nothing. */
type Fault = { readonly why: string } | { readonly error: unknown } | undefined

/**
 * Waits until enough of an answer is there to see that it is one, and gives it on with all its bytes.
 * Throws AdapterError by its status, its error or its nonsense, or the signal's reason.
 */
export async function checkedAnswer (node: AdapterNode, path: string, response: FlowingResponse, call: Call, read?: FailureReader): Promise<UpstreamResponse> {
  if (response.statusCode >= 300) throw failureError(await readFailure(node, response), read)
  const type = textOf(response.headers['content-type'])
  try {
    const [answer, fault] = await (/^text\/event-stream\b/i.test(type ?? '') ? beginStream(path, response, call) : beginBody(path, type, response))
    if (fault === undefined) return answer
    throw 'why' in fault ? nonsense(node, fault.why) : failureError(failureOf(node, fault.error, response.headers), read)
  } catch (error) {
    response.close(error as Error)
    throw call.signal.aborted ? call.signal.reason : AdapterError.is(error) ? error : brokenOff(node, error as Error)
  }
}

function textOf (header: string | string[] | undefined): string | undefined {
  return Array.isArray(header) ? header[0] : header
}

async function beginBody (path: string, type: string | undefined, response: FlowingResponse): Promise<[UpstreamResponse, Fault]> {
  const { headers } = response
  if (!(GENERATES.test(path) || isJson(type) || isPage(type))) {
    const begun = await peek(response, () => 0) !== undefined
    return [begun ? response : wholeResponse(response, Buffer.alloc(0)), undefined]
  }
  let all: Buffer | undefined
  const begun = await peek(response, (bytes, ended) => {
    if (ended) all = bytes
    return ended || bytes.length > HELD_LIMIT ? 0 : undefined
  })
  const encoding = textOf(headers['content-encoding']) ?? 'identity'
  if (begun !== undefined) return [response, encoding === 'identity' ? checkBody(path, type, begun, false) : undefined]
  const whole = all ?? Buffer.alloc(0)
  return [wholeResponse(response, whole), encoding === 'identity' ? checkBody(path, type, whole, true) : checkEncoded(path, type, whole, encoding)]
}

/** The gateway asks for no encoding; a server that compresses all the same may do it well. */
function checkEncoded (path: string, type: string | undefined, bytes: Buffer, encoding: string): Fault {
  try {
    const plain = decode(bytes, encoding, DECODED_LIMIT)
    return plain === undefined ? undefined : checkBody(path, type, plain, true)
  } catch (error) {
    return codeOf(error) === 'ERR_BUFFER_TOO_LARGE' ? undefined : { why: `a body that is no ${encoding}` }
  }
}

/** All of the body has been read: as an answer that came at once. */
function wholeResponse ({ statusCode, headers }: UpstreamResponse, bytes: Buffer): UpstreamResponse {
  const body = new Readable({ read () {} })
  if (bytes.length > 0) body.push(bytes)
  body.push(null)
  const { 'transfer-encoding': _chunked, ...kept } = headers
  return { statusCode, headers: { ...kept, 'content-length': String(bytes.length) }, body }
}

/** What comes before the first event that says something is for the client at once. */
async function beginStream (path: string, response: FlowingResponse, { onAlive }: Call): Promise<[UpstreamResponse, Fault]> {
  let at = 0
  let mark = 0
  let first: StreamEvent | undefined
  /** Where what is kept for the client begins. */
  let kept: number | undefined
  const begun = await peek(response, bytes => {
    // A byte order mark is no part of the first line, and none of a client's stream, where it may not come first.
    if (at === 0 && bytes.indexOf(BYTE_ORDER_MARK) === 0) at = mark = BYTE_ORDER_MARK.length
    for (;;) {
      const event = eventAt(bytes, at)
      const passed = kept ?? (onAlive === undefined ? mark : at)
      if (event === undefined) return bytes.length - at > FIRST_EVENT_LIMIT ? passed : undefined
      if (CHOICES.test(path) && isPreamble(event)) kept = passed
      else if (!isAlive(event)) {
        first = event
        return passed
      } else if (kept === undefined) onAlive?.(bytes.subarray(at, event.end), response)
      at = event.end
    }
  })
  if (begun === undefined) return [response, { why: 'a stream that ended before its first event' }]
  return [response, first === undefined ? undefined : checkEvent(path, first)]
}

/**
 * Reads until `look` has seen enough, and puts back what has come but for so many bytes as `look` says. Undefined when the
 * body ends before, of which `look` learns too; rejects when it breaks off.
 */
function peek (response: FlowingResponse, look: (bytes: Buffer, ended: boolean) => number | undefined): Promise<Buffer | undefined> {
  let bytes: Buffer = Buffer.alloc(0)
  return new Promise((resolve, reject) => {
    response.flow({
      data: chunk => {
        bytes = bytes.length === 0 ? chunk : Buffer.concat([bytes, chunk])
        const passed = look(bytes, false)
        if (passed === undefined) return
        bytes = bytes.subarray(passed)
        response.hold(bytes)
        resolve(bytes)
      },
      end: () => {
        look(bytes, true)
        resolve(undefined)
      },
      error: reject
    })
  })
}

function isJson (type: string | undefined): boolean {
  return type !== undefined && /^application\/([\w.-]+\+)?json\b/i.test(type)
}

function isPage (type: string | undefined): boolean {
  return type !== undefined && /^text\/html\b/i.test(type)
}

/** @param whole false: these are the first bytes of a body that is too long to be held */
function checkBody (path: string, type: string | undefined, bytes: Buffer, whole: boolean): Fault {
  const generates = GENERATES.test(path)
  if (isPage(type)) return { why: 'a page' }
  if (bytes.length === 0) return generates ? { why: 'an empty body' } : undefined
  if (!isJson(type)) return generates ? { why: type === undefined ? 'a body without content-type' : `content-type ${type}` } : undefined
  if (bytes.length > PARSE_LIMIT) return !generates || looksWhole(bytes, whole) ? undefined : { why: 'JSON that is no object, or is cut' }
  let value: unknown
  try {
    value = JSON.parse(bytes.toString('utf8'))
  } catch {
    return { why: 'JSON that is cut or wrong' }
  }
  return generates ? checkValue(value, CHOICES.test(path)) : undefined
}

function looksWhole (bytes: Buffer, whole: boolean): boolean {
  const first = bytes.find(byte => byte > SPACE)
  const last = bytes.findLast(byte => byte > SPACE)
  return first === OPEN && (!whole || last === CLOSE)
}

function checkValue (value: unknown, choices: boolean): Fault {
  if (!hasMembers(value)) return { why: 'JSON that is no answer' }
  if (isErrorBody(value)) return { error: value }
  return choices && !hasChoices(value) ? { why: 'an answer without choices' } : undefined
}

function hasMembers (value: unknown): value is { readonly choices?: unknown } {
  return typeof value === 'object' && value !== null && !Array.isArray(value) && Object.keys(value).length > 0
}

function hasChoices ({ choices }: { choices?: unknown }): boolean {
  return Array.isArray(choices) && choices.length > 0 && choices.every(choice => typeof choice === 'object' && choice !== null)
}

/** An event at the beginning of a stream. */
interface StreamEvent {
  /** Bytes up to the end of this event. */
  readonly end: number
  /** Field `event`. */
  readonly name: string | undefined
  /** Undefined when the event has no data: a comment, or `retry`. */
  readonly data: string | undefined
}

/** The event that begins at `start`; undefined while its end has not come. */
function eventAt (bytes: Buffer, start: number): StreamEvent | undefined {
  let name: string | undefined
  let data: string | undefined
  for (let at = start; ;) {
    const end = lineEnd(bytes, at)
    if (end === undefined) return undefined
    const line = bytes.toString('utf8', at, end.text)
    if (line === '') return { end: end.next, name, data }
    const colon = line.indexOf(':')
    const field = colon === -1 ? line : line.slice(0, colon)
    const value = colon === -1 ? '' : line.slice(line[colon + 1] === ' ' ? colon + 2 : colon + 1)
    if (field === 'data') data = data === undefined ? value : `${data}\n${value}`
    else if (field === 'event') name = value
    // llama.cpp writes `error: {...}`.
    else if (field === 'error') [name, data] = ['error', value]
    at = end.next
  }
}

const LF = 0x0a
const CR = 0x0d

function lineEnd (bytes: Buffer, start: number): { readonly text: number, readonly next: number } | undefined {
  for (let at = start; at < bytes.length; at++) {
    if (bytes[at] === LF) return { text: at, next: at + 1 }
    // A CR at the end of what is there may be half of CRLF; what follows it shows.
    if (bytes[at] === CR) return at + 1 < bytes.length ? { text: at, next: bytes[at + 1] === LF ? at + 2 : at + 1 } : bytes[at - 1] === CR || bytes[at - 1] === LF ? { text: at, next: at + 1 } : undefined
  }
  return undefined
}

/** Says that the server is alive, and nothing else: a comment, an event without data, a ping. */
function isAlive ({ name, data }: StreamEvent): boolean {
  return data === undefined || name === 'ping' || /^\{"type":\s*"ping"\}$/.test(data)
}

/** Says something of the answer, and is no part of it: what a filter says of the prompt, or the usage alone. */
function isPreamble ({ name, data = '' }: StreamEvent): boolean {
  if (name === 'error' || !/"choices":\s*\[\s*\]/.test(data)) return false
  try {
    const value = JSON.parse(data) as { choices?: unknown }
    return !isErrorBody(value) && Array.isArray(value.choices) && value.choices.length === 0
  } catch {
    return false
  }
}

/** What is wrong with the first event that says something. */
function checkEvent (path: string, { name, data = '' }: StreamEvent): Fault {
  const generates = GENERATES.test(path)
  let value: unknown
  try {
    value = JSON.parse(data)
  } catch {
    if (name === 'error') return { error: { error: data } }
    return generates ? { why: data.trim() === '[DONE]' ? 'a stream without an answer' : 'an event that is not JSON' } : undefined
  }
  if (name === 'error') return { error: typeof value === 'object' && value !== null ? value : { error: String(value) } }
  if (isErrorBody(value)) return { error: value }
  if (!generates) return undefined
  if (!hasMembers(value)) return { why: 'an event that is no part of an answer' }
  return CHOICES.test(path) && !Array.isArray(value.choices) ? { why: 'an event without choices' } : undefined
}
