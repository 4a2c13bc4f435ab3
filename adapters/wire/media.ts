/**
 * How media stand in the body of a request: one grammar, read by the gateway's byte scanner (plugin/body/media-collector.ts)
 * and by the engines' parser (`partsOf` below). It has every spelling that vLLM, SGLang and LMDeploy take, in /v1/chat/completions,
 * /v1/responses and /v1/messages:
 *
 * - Messages stand in a top-level list (`MESSAGE_LISTS`), and their parts in a list of theirs (`PART_LISTS`), or one part alone.
 * - A part is media by its type (`MEDIA`). One without a type, or with a `uuid`, is media by the first member of `MEDIA` that it has.
 * - Its URL, or base64 text, stands in the member of its type or, failing that, in one of `SOURCES`: as a string, or as `url` or
 *   `data` of an object. Media without one (null beside a `uuid`, a file id) and embeddings are media all the same: a server has to see them.
 * - A part that is no media itself may have a list of parts (a tool's result).
 *
 * Null is absent.
 */
import { isObject, listOf, textOf, type Json } from './json.ts'

export type Modality = 'image' | 'video' | 'audio'

/** Top-level members that hold messages: of chats, and of /v1/responses. */
export const MESSAGE_LISTS: ReadonlySet<string> = new Set(['messages', 'input'])

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
}

/** All parts of a body in order of appearance, a part's own parts behind it. */
export function * partsOf (body: Json): Generator<FoundPart> {
  for (const list of Object.keys(body).filter(name => MESSAGE_LISTS.has(name))) {
    for (const [message, value] of listOf(body[list]).entries()) {
      if (!isObject(value)) continue
      for (const name of Object.keys(value).filter(name => PART_LISTS.has(name))) {
        const content = value[name]
        const path = `${list}[${message}].${name}`
        if (isObject(content)) yield { part: content, message, index: 0, path, type: mediaType(content) }
        else yield * partsIn(listOf(content), path, 0, message)
      }
    }
  }
}

function * partsIn (parts: readonly unknown[], list: string, depth: number, message: number, outermost?: number): Generator<FoundPart> {
  for (const [i, part] of parts.entries()) {
    const index = outermost ?? i
    const path = `${list}[${i}]`
    const type = isObject(part) ? mediaType(part) : undefined
    yield { part, message, index, path, type }
    if (type === undefined && isObject(part) && depth < MAX_NESTING) yield * partsIn(listOf(part.content), `${path}.content`, depth + 1, message, index)
  }
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
