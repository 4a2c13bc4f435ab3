import { setImmediate as immediate } from 'node:timers/promises'
import type { RequestBody } from '../../adapters/adapter.ts'

export interface Thumbnail {
  readonly type: string
  readonly bytes: Buffer
}

export interface ThumbnailOptions {
  /** Pictures kept. @default 400 */
  readonly maxPictures?: number
  /** Bytes of all that are kept. @default 8 MiB */
  readonly maxBytes?: number
}

interface Job { readonly traceId: string, readonly index: number, readonly base64: Buffer }
type Shrink = (bytes: Buffer) => Promise<Thumbnail | undefined>

const DEFAULT_MAX_PICTURES = 400
const DEFAULT_MAX_BYTES = 8 * 1024 * 1024
/** Edge of a thumbnail, in pixels. */
const EDGE = 192
/** Pictures kept of one request. */
const MAX_ITEMS = 16
const MAX_WAITING = 16
const MAX_WAITING_BYTES = 32 * 1024 * 1024
const MAX_INPUT_BYTES = 24 * 1024 * 1024
const MAX_INPUT_PIXELS = 64_000_000
/** Without sharp, pictures up to this size are kept as they are. */
const MAX_PLAIN_BYTES = 64 * 1024
const DATA_URL = /^data:image\/[a-z0-9.+-]+;base64,/i

/**
 * Small copies of the pictures of recent requests, for the inspection page; only when content capture is on. Bounded in
 * number and bytes, the oldest leave first. To not slow requests down, it shrinks one picture at a time and drops new ones
 * while too many wait.
 */
export class Thumbnails {
  readonly #kept = new Map<string, Thumbnail>()
  readonly #maxPictures: number
  readonly #maxBytes: number
  readonly #queue: Job[] = []
  /** Keys of pictures that wait or are being shrunk. */
  readonly #coming = new Set<string>()
  #listeners: Array<() => void> = []
  #bytes = 0
  #waitingBytes = 0
  #working: Promise<void> | undefined
  #closed = false

  constructor (options: ThumbnailOptions = {}) {
    this.#maxPictures = options.maxPictures ?? DEFAULT_MAX_PICTURES
    this.#maxBytes = options.maxBytes ?? DEFAULT_MAX_BYTES
  }

  get size (): number { return this.#kept.size }
  get bytes (): number { return this.#bytes }

  /** Keeps the inline pictures of a body. Pictures behind URLs are not kept: only the encoder fetches them. */
  keep (traceId: string, body: RequestBody): void {
    if (this.#closed) return
    for (const { index, modality, url } of body.media.slice(0, MAX_ITEMS)) {
      if (modality !== 'image' || this.#queue.length >= MAX_WAITING || this.#waitingBytes > MAX_WAITING_BYTES) continue
      const head = DATA_URL.exec(body.bytes.toString('latin1', url.start, Math.min(url.end, url.start + 64)))
      const start = url.start + (head?.[0].length ?? 0)
      if (head === null || (url.end - start) * 0.75 > MAX_INPUT_BYTES) continue
      // Copied, because the body's memory is recycled when the request ends.
      this.#queue.push({ traceId, index, base64: Buffer.from(body.bytes.subarray(start, url.end)) })
      this.#waitingBytes += url.end - start
      this.#coming.add(keyOf(traceId, index))
    }
    if (this.#queue.length > 0) this.#working ??= this.#work()
  }

  get (traceId: string, index: number): Thumbnail | undefined {
    return this.#kept.get(keyOf(traceId, index))
  }

  /** Like `get`, but waits for a picture that is being shrunk: the page asks as soon as it lists the request. */
  async find (traceId: string, index: number): Promise<Thumbnail | undefined> {
    const key = keyOf(traceId, index)
    while (this.#coming.has(key)) await new Promise<void>(resolve => { this.#listeners.push(resolve) })
    return this.#kept.get(key)
  }

  async close (): Promise<void> {
    this.#closed = true
    this.#queue.length = 0
    this.#coming.clear()
    this.#tell()
    await this.#working
  }

  async #work (): Promise<void> {
    const shrink = await shrinker()
    // Passing a picture to sharp takes time on this thread: let the request go first.
    await immediate()
    for (let job = this.#queue.shift(); job !== undefined; job = this.#queue.shift()) {
      const key = keyOf(job.traceId, job.index)
      const thumbnail = await shrink(Buffer.from(job.base64.toString('latin1'), 'base64'))
      if (thumbnail !== undefined && !this.#closed) this.#put(key, thumbnail)
      this.#waitingBytes -= job.base64.length
      this.#coming.delete(key)
      this.#tell()
    }
    this.#working = undefined
  }

  #tell (): void {
    for (const listener of this.#listeners.splice(0)) listener()
  }

  #put (key: string, thumbnail: Thumbnail): void {
    this.#bytes += thumbnail.bytes.length - (this.#kept.get(key)?.bytes.length ?? 0)
    this.#kept.set(key, thumbnail)
    for (const [oldest, { bytes }] of this.#kept) {
      if (this.#kept.size <= this.#maxPictures && this.#bytes <= this.#maxBytes) return
      this.#kept.delete(oldest)
      this.#bytes -= bytes.length
    }
  }
}

function keyOf (traceId: string, index: number): string {
  return `${traceId} ${index}`
}

/** A variable, so that a bundler leaves this optional native package alone. */
const SHARP: string = 'sharp'
let loading: Promise<Shrink> | undefined

function shrinker (): Promise<Shrink> {
  loading ??= (import(SHARP) as Promise<typeof import('sharp')>).then(({ default: sharp }): Shrink => async bytes => {
    try {
      const picture = sharp(bytes, { limitInputPixels: MAX_INPUT_PIXELS, sequentialRead: true }).autoOrient()
      const small = await picture.resize(EDGE, EDGE, { fit: 'inside', withoutEnlargement: true }).webp({ quality: 75 }).toBuffer()
      return { type: 'image/webp', bytes: small }
    } catch {
      // Not a picture; the encoder's error goes to the client.
      return undefined
    }
  }, (): Shrink => async bytes => {
    const type = typeOf(bytes)
    return type === undefined || bytes.length > MAX_PLAIN_BYTES ? undefined : { type, bytes }
  })
  return loading
}

function typeOf (bytes: Buffer): string | undefined {
  const head = bytes.toString('latin1', 0, 12)
  if (head.startsWith('\x89PNG')) return 'image/png'
  if (head.startsWith('\xff\xd8\xff')) return 'image/jpeg'
  return head.startsWith('RIFF') && head.endsWith('WEBP') ? 'image/webp' : undefined
}
