/** Looks at a request's pictures before a language model that can't bear bad ones gets them. */
import type { MediaItem } from '../../adapters/adapter.ts'
import { abortSignalOf, type TimeLimit } from '../../adapters/abort.ts'
import { MediaFetcher, MediaFetchError } from '../../adapters/wire/media-fetch.ts'
import { parseBody, type Body } from '../body/index.ts'
import { epdError } from '../errors.ts'
import type { MediaOptions } from '../options/index.ts'

/** More than any processor takes; a small file may claim billions. */
const MAX_PIXELS = 100_000_000
/** What both sharp and Pillow decode. */
const FORMATS: ReadonlySet<string> = new Set(['jpeg', 'png', 'webp', 'gif', 'tiff', 'heif'])
const BASE64 = /^[A-Za-z0-9+/_\-\s]+={0,2}\s*$/

/** Undefined when the bytes are a picture; else what is wrong with them. */
type Look = (bytes: Buffer) => Promise<string | undefined>

export class MediaCheck {
  readonly #options: MediaOptions
  #fetcher: MediaFetcher | undefined

  constructor (options: MediaOptions) {
    this.#options = options
  }

  /**
   * The request with its pictures checked: each is there and can be decoded. A picture behind an address is fetched, and
   * stands in the body from here on, so that what was looked at is what gets encoded.
   *
   * @throws EPD_ERR_INVALID_MEDIA that names the part, or the signal's reason
   */
  async check (body: Body, signal: TimeLimit): Promise<Body> {
    const urls: string[] = []
    const look = await looker()
    for (const item of body.media) {
      if (item.url.end === item.url.start) {
        if (item.modality === 'image') throw invalid(item, 'it has no URL')
        continue
      }
      const found = await this.#bytesOf(item, textOf(body, item), signal)
      if (found === undefined) continue
      const wrong = await look(found.bytes)
      if (signal.aborted) throw signal.reason
      if (wrong !== undefined) throw invalid(item, wrong)
      if (found.fetched) urls[item.index] = `data:application/octet-stream;base64,${found.bytes.toString('base64')}`
    }
    return urls.length === 0 ? body : await parseBody(Buffer.concat(body.splice({ mediaUrls: urls })))
  }

  async close (): Promise<void> {
    await this.#fetcher?.close()
  }

  /** Undefined for what is no picture, whose place alone is looked at. */
  async #bytesOf (item: MediaItem, url: string, signal: TimeLimit): Promise<{ readonly bytes: Buffer, readonly fetched: boolean } | undefined> {
    const scheme = /^\s*([a-z][a-z0-9+.-]*):/i.exec(url)?.[1]?.toLowerCase()
    const { maxBytes } = this.#options
    if (scheme === 'http' || scheme === 'https') {
      if (item.modality !== 'image') return undefined
      this.#fetcher ??= new MediaFetcher({ policy: this.#options, maxBytes, timeoutMs: this.#options.timeout })
      const bytes = await this.#fetcher.fetch(url, abortSignalOf(signal)).catch((err: unknown) => { throw err instanceof MediaFetchError ? invalid(item, err.message, err) : err })
      return { bytes, fetched: true }
    }
    // A path would be one on the disk of the encoder.
    if (scheme !== 'data' && !(scheme === undefined && BASE64.test(url.slice(0, 4_096)))) throw invalid(item, 'its URL must be a data, http or https one')
    if (item.modality !== 'image') return undefined
    const comma = scheme === undefined ? -1 : url.indexOf(',')
    if (scheme === 'data' && !/;\s*base64\s*$/i.test(url.slice(0, Math.max(0, comma)))) throw invalid(item, 'its data URL must hold base64')
    const bytes = Buffer.from(url.slice(comma + 1), 'base64')
    if (bytes.length > maxBytes) throw invalid(item, `it is larger than ${maxBytes} bytes`)
    return { bytes, fetched: false }
  }
}

function invalid (item: MediaItem, reason: string, cause?: unknown): Error {
  return epdError('EPD_ERR_INVALID_MEDIA', [`${item.path} can not be used: ${reason}`], { param: item.path, cause })
}

function textOf ({ bytes }: Body, { url: { start, end } }: MediaItem): string {
  const text = bytes.toString('latin1', start, end)
  return text.includes('\\') ? JSON.parse(`"${bytes.toString('utf8', start, end)}"`) as string : text
}

/** A variable, so that a bundler leaves this optional native package alone. */
const SHARP: string = 'sharp'
let loading: Promise<Look> | undefined

/** Without sharp the bytes' beginning is all that is looked at. */
function looker (): Promise<Look> {
  loading ??= (import(SHARP) as Promise<typeof import('sharp')>).then(({ default: sharp }): Look => async bytes => {
    // Pillow reads BMP, sharp does not.
    if (isBmp(bytes)) return undefined
    try {
      const picture = sharp(bytes, { limitInputPixels: MAX_PIXELS, sequentialRead: true, failOn: 'error' })
      const { format } = await picture.metadata()
      if (!FORMATS.has(format)) return `${format} is no format of pictures`
      // Reads all of it, and keeps little.
      await picture.resize(8, 8, { fit: 'fill', kernel: 'nearest' }).raw().toBuffer()
      return undefined
    } catch (err) {
      return /pixel limit/i.test((err as Error).message) ? `it has more than ${MAX_PIXELS} pixels` : 'its bytes are no picture that can be decoded'
    }
  }, (): Look => async bytes => isBmp(bytes) || /^(\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftyp)/s.test(bytes.toString('latin1', 0, 12)) ? undefined : 'its bytes are no picture')
  return loading
}

function isBmp (bytes: Buffer): boolean {
  return bytes.length > 26 && bytes.toString('latin1', 0, 2) === 'BM'
}
