/** Is what came an answer? Before its head goes to a client, another node can still give one. */
import { Readable } from 'node:stream'
import { AdapterError, type AdapterNode, type Call, type UpstreamResponse } from '../adapter.ts'
import { isErrorBody } from './error-shape.ts'
import { brokenOff, codeOf, decode, failureError, failureOf, nonsense, readFailure, type FailureReader } from './failures.ts'
import type { FlowingResponse } from '../flow.ts'
import { JoinedBytes } from '../joined-bytes.ts'

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
  let mark = 0
  const events = new EventReader()
  let first: StreamEvent | undefined
  /** Where what is kept for the client begins. */
  let kept: number | undefined
  const begun = await peek(response, bytes => {
    // A byte order mark is no part of the first line, and none of a client's stream, where it may not come first.
    if (mark === 0 && bytes.subarray(0, BYTE_ORDER_MARK.length).equals(BYTE_ORDER_MARK)) {
      mark = BYTE_ORDER_MARK.length
      events.skip(mark)
    }
    for (;;) {
      const start = events.at
      const event = events.next(bytes)
      const passed = kept ?? (onAlive === undefined ? mark : start)
      if (event === undefined) return bytes.length - start > FIRST_EVENT_LIMIT ? passed : undefined
      if (CHOICES.test(path) && isPreamble(event)) kept = passed
      else if (!isAlive(event)) {
        first = event
        return passed
      } else if (kept === undefined) onAlive?.(bytes.subarray(start, events.at), response)
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
  const come = new JoinedBytes()
  return new Promise((resolve, reject) => {
    response.flow({
      data: chunk => {
        come.add(chunk)
        const passed = look(come.bytes, false)
        if (passed === undefined) return
        const rest = come.bytes.subarray(passed)
        response.hold(rest)
        resolve(rest)
      },
      end: () => {
        look(come.bytes, true)
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
  /** Field `event`. */
  readonly name: string | undefined
  /** Undefined when the event has no data: a comment, or `retry`. */
  readonly data: string | undefined
}

const LF = 0x0a
const CR = 0x0d

/** Reads events from bytes that grow, each byte once, however they are cut. */
class EventReader {
  /** Where the next event begins. */
  at = 0
  /** Where the line that is being read begins. */
  #line = 0
  /** Up to here that line has no end. */
  #seen = 0
  #name: string | undefined
  #data: string | undefined

  /** At the beginning. */
  skip (bytes: number): void {
    this.at = this.#line = this.#seen = bytes
  }

  /** Undefined while the end of the next event has not come. */
  next (bytes: Buffer): StreamEvent | undefined {
    for (;;) {
      const end = this.#lineEnd(bytes)
      if (end === undefined) return undefined
      const line = bytes.toString('utf8', this.#line, this.#seen)
      this.#line = this.#seen = end
      if (line === '') break
      this.#field(line)
    }
    const event = { name: this.#name, data: this.#data }
    this.#name = this.#data = undefined
    this.at = this.#line
    return event
  }

  /** Goes to the end of the line, and says where the next one begins. */
  #lineEnd (bytes: Buffer): number | undefined {
    while (this.#seen < bytes.length && bytes[this.#seen] !== LF && bytes[this.#seen] !== CR) this.#seen++
    if (this.#seen === bytes.length) return undefined
    const next = this.#seen + 1
    if (bytes[this.#seen] === LF) return next
    if (next < bytes.length) return bytes[next] === LF ? next + 1 : next
    // A CR at the end of what is there may be half of CRLF; what follows it shows. An empty line needs none.
    return this.#seen === this.#line ? next : undefined
  }

  #field (line: string): void {
    const colon = line.indexOf(':')
    const field = colon === -1 ? line : line.slice(0, colon)
    const value = colon === -1 ? '' : line.slice(line[colon + 1] === ' ' ? colon + 2 : colon + 1)
    if (field === 'data') this.#data = this.#data === undefined ? value : `${this.#data}\n${value}`
    else if (field === 'event') this.#name = value
    // llama.cpp writes `error: {...}`.
    else if (field === 'error') [this.#name, this.#data] = ['error', value]
  }
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
