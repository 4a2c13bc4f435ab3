/**
 * How media stand in the body of a request: one grammar, read by the gateway's byte scanner (plugin/body/media-collector.ts)
 * and by the engines' parser (`partsOf` below). It has every spelling that vLLM, SGLang and LMDeploy take, in /v1/chat/completions,
 * /v1/responses, /v1/messages, /v1/completions, and what embeds, ranks and scores:
 *
 * - Messages stand in a top-level member (`MESSAGE_LISTS`), in a list or one alone, and their parts in a member of theirs (`PART_LISTS`), in a list or one
 *   alone. But for those of a chat's list, a message without a role may be a part itself.
 * - Some other members are read in the same way (`APART`), and some are media themselves (`LOOSE`). Only a server that sees can take these.
 * - A part is media by its type (`MEDIA`). One without a type, or with a `uuid`, is media by the first member of `MEDIA` that it has.
 * - Its URL, or base64 text, stands in the member of its type or, failing that, in one of `SOURCES`: as a string, or as `url` or
 *   `data` of an object. Media without one (null beside a `uuid`, a file id) and embeddings are media all the same: a server has to see them.
 * - A part that is no media itself may have a list of parts (a tool's result), also in its `source` (a document).
 *
 * Null is absent.
 */
import { isObject, listOf, textOf, type Json } from './json.ts'

export type Modality = 'image' | 'video' | 'audio'

/** Top-level members that hold messages: of chats, and of /v1/responses. */
export const MESSAGE_LISTS: ReadonlySet<string> = new Set(['messages', 'input'])

/** Others with parts, or with objects that hold parts: what is ranked or scored, a system prompt. */
export const APART: ReadonlySet<string> = new Set(['system', 'documents', 'query', 'queries', 'items', 'inputs', 'text_1', 'text_2', 'data_1', 'data_2'])

/** Others that are media, by their type: URL or base64 text, an object with one, or a list of these. */
export const LOOSE: ReadonlyMap<string, string> = new Map([['image_data', 'image_data'], ['video_data', 'video'], ['audio_data', 'audio']])

/** Members of a message that hold its parts: `output` is a tool's, in /v1/responses. In a part only `content`. */
export const PART_LISTS: ReadonlySet<string> = new Set(['content', 'output'])

/** Types of media parts, which are members of such parts too. Where several are there, engines go by this order. */
export const MEDIA: ReadonlyMap<string, Modality> = new Map<string, Modality>([
  ['image_url', 'image'],
  ['image_pil', 'image'],
  ['image_embeds', 'image'],
  ['audio_embeds', 'audio'],
  ['video_embeds', 'video'],
  ['audio_url', 'audio'],
  ['input_audio', 'audio'],
  ['video_url', 'video'],
  ['image_data', 'image'],
  ['image', 'image'],
  ['input_image', 'image'],
  ['computer_screenshot', 'image'],
  ['audio', 'audio'],
  ['video', 'video']
])

/** Where the media of a part stand that has no member of its type's name. */
export const SOURCES = ['image_url', 'source', 'url', 'data'] as const

/** Members of an object that holds media, the first one first. */
export const URL_MEMBERS = ['url', 'data'] as const

/** What a model has made of media, or a program's object: nothing to encode. */
export const isEmbedded = (type: string): boolean => /_(embeds|pil)$/.test(type)

/** Types of parts that are text, and the member that holds it. */
export const TEXT_PARTS: ReadonlyMap<string, string> = new Map([
  ['text', 'text'], ['input_text', 'text'], ['output_text', 'text'], ['refusal', 'refusal'], ['thinking', 'thinking']
])

/** Parts of parts of parts: no API has more. */
export const MAX_NESTING = 4

/** What decides a part: its type, and the members of the grammar that it has. */
export interface PartView {
  /** Undefined when it is absent or null; '' when it is no string. */
  readonly type: string | undefined
  readonly hasUuid: boolean
  /** Has the part this member? Null counts beside a `uuid` only: "the picture that you know by it". */
  has (member: string): boolean
}

/** The media type of a part, if it is media. */
export function mediaTypeOf ({ type, hasUuid, has }: PartView): string | undefined {
  if (type !== undefined && MEDIA.has(type)) return type
  if (type !== undefined && !hasUuid) return undefined
  for (const member of MEDIA.keys()) if (has(member)) return member
  return undefined
}

/** Members that may hold the URL of media of this type, in order. */
export function sourcesOf (type: string): readonly string[] {
  return isEmbedded(type) ? [] : [type, ...SOURCES]
}

/** A part of a body, and where it stands. */
export interface FoundPart {
  readonly part: unknown
  /** Of its message in the list, and of the outermost part in the message. */
  readonly message: number
  readonly index: number
  /** `messages[0].content[1]`, `messages[0].content[1].content[0]` */
  readonly path: string
  /** Undefined when it is no media. */
  readonly type: string | undefined
  /** Media that no encoder gets: it stands where only a server that sees knows what to do with it. */
  readonly apart: boolean
}

/** All parts of a body in order of appearance, a part's own parts behind it. */
export function * partsOf (body: Json): Generator<FoundPart> {
  for (const [name, value] of Object.entries(body)) {
    const loose = LOOSE.get(name)
    if (loose !== undefined) yield * looseIn(value, name, loose, 0)
    else if (MESSAGE_LISTS.has(name) || APART.has(name)) yield * messagesIn(value, name)
  }
}

function * messagesIn (value: unknown, list: string): Generator<FoundPart> {
  const apart = APART.has(list)
  // Chats are lists of messages, and of nothing else.
  const onlyMessages = list === 'messages' && Array.isArray(value)
  for (const [message, one] of (isObject(value) ? [value] : listOf(value)).entries()) {
    if (!isObject(one)) continue
    const path = isObject(value) ? list : `${list}[${message}]`
    const type = onlyMessages || Object.hasOwn(one, 'role') ? undefined : mediaType(one)
    if (type !== undefined) {
      yield { part: one, message, index: 0, path, type, apart: true }
      continue
    }
    for (const [name, content] of Object.entries(one)) {
      if (name === 'source' && isObject(content) && !onlyMessages) yield * partsIn(listOf(content.content), `${path}.source.content`, 0, message, apart)
      if (!PART_LISTS.has(name)) continue
      if (isObject(content)) yield { part: content, message, index: 0, path: `${path}.${name}`, type: mediaType(content), apart }
      else yield * partsIn(listOf(content), `${path}.${name}`, 0, message, apart)
    }
  }
}

function * partsIn (parts: readonly unknown[], list: string, depth: number, message: number, apart: boolean, outermost?: number): Generator<FoundPart> {
  for (const [i, part] of parts.entries()) {
    const index = outermost ?? i
    const path = `${list}[${i}]`
    const type = isObject(part) ? mediaType(part) : undefined
    yield { part, message, index, path, type, apart }
    if (type !== undefined || !isObject(part) || depth === MAX_NESTING) continue
    for (const [name, value] of Object.entries(part)) {
      if (name === 'content') yield * partsIn(listOf(value), `${path}.content`, depth + 1, message, apart, index)
      else if (name === 'source' && isObject(value)) yield * partsIn(listOf(value.content), `${path}.source.content`, depth + 1, message, apart, index)
    }
  }
}

function * looseIn (value: unknown, path: string, type: string, depth: number): Generator<FoundPart> {
  if (Array.isArray(value)) {
    if (depth <= MAX_NESTING) for (const [i, one] of value.entries()) yield * looseIn(one, `${path}[${i}]`, type, depth + 1)
  } else if (isObject(value) || typeof value === 'string') yield { part: isObject(value) ? value : { [type]: value }, message: 0, index: 0, path, type, apart: true }
}

export function mediaType (part: Json): string | undefined {
  const { type, uuid } = part
  const hasUuid = isGiven(uuid)
  return mediaTypeOf({ type: typeof type === 'string' ? type : isGiven(type) ? '' : undefined, hasUuid, has: member => hasUuid ? Object.hasOwn(part, member) : isGiven(part[member]) })
}

/** The URL or base64 text of a media part, and the member that holds it. */
export function mediaUrl (part: Json, type: string): { readonly url: string, readonly member: string } | undefined {
  for (const member of sourcesOf(type)) {
    const value = part[member]
    const url = isObject(value) ? URL_MEMBERS.map(name => textOf(value[name])).find(text => text !== undefined) : textOf(value)
    if (url !== undefined) return { url, member }
  }
  return undefined
}

function isGiven (value: unknown): boolean {
  return value !== undefined && value !== null
}
