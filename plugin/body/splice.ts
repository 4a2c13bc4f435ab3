/** A body with changes, made of slices of the original bytes. */
import type { BodyEdits, MediaItem, MediaPart } from '../../adapters/adapter.ts'
import type { Member } from './collector.ts'

/** Slices shorter than this are copied together: a write call costs more than copying them, in bytes. */
const SMALL = 4096
/** Bodies up to this size become one buffer, in bytes. */
const ONE_BUFFER = 64 * 1024
/** What a pick takes over beside the media parts: these change how engines read media. */
const PICKED_MEMBERS = ['model', 'mm_processor_kwargs', 'media_io_kwargs'] as const

const COMMA = Buffer.from(',')

/** @see RequestBody.splice. @param members those that go upstream, in order */
export function splice (bytes: Buffer, members: readonly Member[], media: readonly MediaItem[], { set = {}, remove = [], mediaUrls = [], mediaParts = [] }: BodyEdits): Buffer[] {
  const added = new Map(Object.entries(set))
  const texts: Buffer[][] = []
  for (const member of members) {
    const { name, start, end } = member
    if (name !== undefined && added.has(name)) texts.push([memberText(name, added.get(name)!)])
    else if (name !== undefined && remove.includes(name)) continue
    else texts.push(media.length > 0 ? withMedia(bytes, member, media, mediaUrls, mediaParts) : [bytes.subarray(start, end)])
    if (name !== undefined) added.delete(name)
  }
  for (const [name, json] of added) texts.push([memberText(name, json)])
  const chunks = [Buffer.from('{'), ...texts.flatMap((chunks, i) => i === 0 ? chunks : [COMMA, ...chunks])]
  const last = chunks.at(-1)!
  const start = last.byteOffset - bytes.byteOffset
  // The messages often come last: their slice then takes the closing brace along.
  if (last.buffer === bytes.buffer && start + last.length === bytes.length - 1) chunks[chunks.length - 1] = bytes.subarray(start)
  else chunks.push(Buffer.from('}'))
  return compact(chunks)
}

/** @see RequestBody.pick. @param body its bytes, and the JSON text of a top-level member by name */
export function pick (body: { readonly bytes: Buffer, json (name: string): Buffer | undefined }, items: readonly MediaItem[], set: Readonly<Record<string, string>>, parts: BodyEdits['mediaParts'] = []): Buffer[] {
  const chunks: Buffer[] = [Buffer.from('{')]
  for (const name of PICKED_MEMBERS) {
    const json = body.json(name)
    if (json !== undefined && !Object.hasOwn(set, name)) chunks.push(Buffer.from(`"${name}":`), json, COMMA)
  }
  for (const [name, json] of Object.entries(set)) chunks.push(memberText(name, json), COMMA)
  chunks.push(Buffer.from('"messages":['))
  let message: number | undefined
  for (const [i, item] of items.entries()) {
    if (item.message === message) chunks.push(COMMA)
    else chunks.push(Buffer.from(`${message === undefined ? '' : ']},'}{"role":"user","content":[`))
    message = item.message
    const part = parts[i] ?? item.chat
    if (part === undefined) chunks.push(body.bytes.subarray(item.span.start, item.span.end))
    else chunks.push(...partChunks(body.bytes, item, part))
  }
  chunks.push(Buffer.from(message === undefined ? ']}' : ']}]}'))
  return compact(chunks)
}

/** A member, with new URLs and parts for its media. */
function withMedia (bytes: Buffer, list: Member, media: readonly MediaItem[], urls: ReadonlyArray<string | undefined>, parts: ReadonlyArray<MediaPart | undefined>): Buffer[] {
  const chunks: Buffer[] = []
  let start = list.start
  for (const [i, item] of media.entries()) {
    const { url, span } = item
    if (span.start < list.start || span.end > list.end) continue
    const [replacement, part] = [urls[i], parts[i]]
    if (part !== undefined) {
      chunks.push(bytes.subarray(start, span.start), ...partChunks(bytes, item, part))
      start = span.end
    } else if (replacement !== undefined && url.end > url.start) {
      chunks.push(bytes.subarray(start, url.start), Buffer.from(JSON.stringify(replacement).slice(1, -1)))
      start = url.end
    }
  }
  return [...chunks, bytes.subarray(start, list.end)]
}

function partChunks (bytes: Buffer, { url }: MediaItem, { before, after }: MediaPart): Buffer[] {
  return after === undefined ? [Buffer.from(before)] : [Buffer.from(before), bytes.subarray(url.start, url.end), Buffer.from(after)]
}

function memberText (name: string, json: string): Buffer {
  return Buffer.from(`${JSON.stringify(name)}:${json}`)
}

/** Copies neighbouring small chunks together; big ones stay slices of the original. */
function compact (chunks: readonly Buffer[]): Buffer[] {
  if (chunks.reduce((sum, chunk) => sum + chunk.length, 0) <= ONE_BUFFER) return [Buffer.concat(chunks)]
  const result: Buffer[] = []
  let small: Buffer[] = []
  const flush = (): void => {
    const joined = Buffer.concat(small)
    if (joined.length > 0) result.push(joined)
    small = []
  }
  for (const chunk of chunks) {
    if (chunk.length < SMALL) small.push(chunk)
    else {
      flush()
      result.push(chunk)
    }
  }
  flush()
  return result
}
