import { constants } from 'node:fs'
import type { lookup as dnsLookup } from 'node:dns'
import { open, realpath } from 'node:fs/promises'
import { sep } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { MediaFetcher } from '../../adapters/wire/media-fetch.ts'
import type { MediaPolicy } from '../service/engine-options.ts'
import { decodeBase64, decodeDataUrl } from './data-url.ts'
import { MediaError } from './media-error.ts'
import type { MediaSource } from './media-parts.ts'

/** Gets the bytes of a media item, wherever they lie. Fetching is where a request could make us reach what its sender can't. */

export interface MediaLoaderOptions {
  readonly policy: MediaPolicy
  /** Largest media item, bytes. @default 33554432 */
  readonly maxBytes?: number
  /** For one fetch with its redirects, milliseconds. @default 10000 */
  readonly timeoutMs?: number
  /** DNS, replaceable for tests. */
  readonly lookup?: typeof dnsLookup
}

const DEFAULT_MAX_BYTES = 32 * 1024 * 1024
/** Of a data URL, before its base64 text. */
const LONGEST_HEAD = 256
const DEFAULT_TIMEOUT_MS = 10_000

export class MediaLoader {
  readonly #options: MediaLoaderOptions
  readonly #maxBytes: number
  /** Made when the first URL is to be fetched: most engines get data only, and an HTTP client costs 150 ms of CPU to load. */
  #fetcher: MediaFetcher | undefined

  constructor (options: MediaLoaderOptions) {
    this.#options = options
    this.#maxBytes = options.maxBytes ?? DEFAULT_MAX_BYTES
  }

  /** @throws MediaError, or the signal's reason. */
  async load (source: MediaSource, signal: AbortSignal): Promise<Buffer> {
    switch (source.kind) {
      case 'data': return this.#decoded(source.url, decodeDataUrl)
      case 'base64': return this.#decoded(source.text, decodeBase64)
      case 'http': return await this.#fetch(source.url, signal)
      case 'file': return await this.#readFile(source.url)
      case 'epd': throw new MediaError('invalid_media', 'epd: URLs are not taken from clients')
    }
  }

  async close (): Promise<void> {
    await this.#fetcher?.close()
  }

  #decoded (text: string, decode: (text: string) => Buffer): Buffer {
    const tooLarge = (): never => { throw new MediaError('invalid_media', `the picture is larger than ${this.#maxBytes} bytes`) }
    // With a tenth for line breaks. Decoding 64 MiB to find that out holds up the event loop for 150 ms.
    if (text.length * 3 / 4 > this.#maxBytes * 1.1 + LONGEST_HEAD) tooLarge()
    const bytes = decode(text)
    return bytes.length > this.#maxBytes ? tooLarge() : bytes
  }

  async #fetch (url: string, signal: AbortSignal): Promise<Buffer> {
    const { MediaFetcher, MediaFetchError } = await import('../../adapters/wire/media-fetch.ts')
    const { policy, timeoutMs = DEFAULT_TIMEOUT_MS, lookup } = this.#options
    this.#fetcher ??= new MediaFetcher({ policy, maxBytes: this.#maxBytes, timeoutMs, lookup })
    try {
      return await this.#fetcher.fetch(url, signal)
    } catch (err) {
      throw err instanceof MediaFetchError ? new MediaError('media_fetch_failed', err.message, { cause: err.cause ?? err }) : err
    }
  }

  async #readFile (text: string): Promise<Buffer> {
    const { directory } = this.#options.policy
    if (directory === undefined) throw new MediaError('invalid_media', 'file: URLs are not allowed')
    // One message for "outside", "not there" and "not a file": which it is would reveal what is on our disk.
    const refusal = new MediaError('invalid_media', 'the file is not in the folder media may come from, or can\'t be read')
    let path: string
    try {
      const [root, real] = await Promise.all([realpath(directory), realpath(fileURLToPath(text))])
      if (!real.startsWith(root.endsWith(sep) ? root : root + sep)) throw refusal
      path = real
    } catch {
      throw refusal
    }
    // The path is resolved; NOFOLLOW refuses a link put in its place meanwhile, NONBLOCK a pipe.
    const file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK).catch(() => { throw refusal })
    try {
      const stat = await file.stat()
      if (!stat.isFile()) throw refusal
      if (stat.size > this.#maxBytes) throw new MediaError('invalid_media', `the picture is larger than ${this.#maxBytes} bytes`)
      return await file.readFile()
    } finally {
      await file.close()
    }
  }
}
