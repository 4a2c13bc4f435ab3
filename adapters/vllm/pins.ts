import { createCipheriv, createHmac, randomBytes } from 'node:crypto'
import type { BodyEdits, MediaItem, MediaPart, RequestBody } from '../adapter.ts'

/** With these vLLM makes something else of the same bytes, and a `uuid` would stand for both. */
const SHAPING = ['mm_processor_kwargs', 'media_io_kwargs'] as const
/** Types that vLLM reads from `url` alone. Of `input_audio` it reads `data`, which need not be what the gateway has hashed. */
const BY_URL: ReadonlySet<string> = new Set(['image_url', 'video_url', 'audio_url'])

const NONCE = Buffer.alloc(12)
/** Retired names remembered. */
const MAX_RETIRED = 1_024

/** An item's name on one encoder, for one tenant. */
export interface Pin {
  readonly item: MediaItem
  /** The item's first name. */
  readonly first: string
  /** What the gateway remembers the item by. */
  readonly name: string
  /** Sent as `uuid`; undefined where vLLM's own hash of the content must do. */
  readonly uuid: string | undefined
  /** May the shape of its features stand for it? Not where the request shapes the picture: its key at PD would be another one. */
  readonly rewritable: boolean
}

/**
 * Names media items for vLLM, whose `uuid` is the only key of its caches and files. The name is a keyed hash, 64 hex
 * digits: no client can guess another one's. It covers the encoder too, so that no two processes write the same file.
 */
export class Pins {
  readonly #secret: string | Buffer
  readonly #digestKey: Buffer
  readonly #digests = new WeakMap<MediaItem, string>()
  /** How many names of an item were retired, by its first. */
  readonly #retired = new Map<string, number>()

  constructor (secret: string | undefined) {
    this.#secret = secret ?? randomBytes(32)
    this.#digestKey = createHmac('sha256', this.#secret).update('digest').digest()
  }

  /**
   * A picture behind an address is named by vLLM itself, after its bytes: they may change between two downloads, and a
   * picture of another size under a taken `uuid` ends the process.
   */
  pin (item: MediaItem, body: RequestBody, encoder: string, tenant: string | undefined): Pin {
    const first = this.#hash('media', encoder, tenant ?? null, body.model, item.modality, this.#digest(item, body))
    const retired = this.#retired.get(first)
    const name = retired === undefined ? first : this.#hash('again', first, String(retired))
    const rewritable = !SHAPING.some(member => body.has(member))
    return { item, first, name, uuid: rewritable && BY_URL.has(item.type) && !item.remote ? name : undefined, rewritable }
  }

  /** What lies under this name may have ended a server: the item is encoded again, under another one. */
  retire ({ first }: Pin): void {
    const before = this.#retired.get(first) ?? 0
    this.#retired.delete(first)
    this.#retired.set(first, before + 1)
    if (this.#retired.size > MAX_RETIRED) this.#retired.delete(this.#retired.keys().next().value!)
  }

  /** Keeps prefix caches of tenants apart; a salt of the client's own still counts. */
  salt (body: RequestBody, tenant: string | undefined): BodyEdits {
    if (tenant === undefined) return {}
    return { set: { cache_salt: JSON.stringify(this.#hash('salt', tenant, String(body.scalar('cache_salt') ?? ''))) } }
  }

  /**
   * Stands for all bytes of an item's URL in its name: AES-GMAC, under a key of its own. It takes a sixth of SHA-256's time,
   * and whoever does not know the key can't make two pictures of one digest (2^-100 a try). It never leaves this class but in
   * a hash, which is why one nonce may serve for all of them.
   *
   * @see https://csrc.nist.gov/pubs/sp/800/38/d/final
   */
  #digest (item: MediaItem, { bytes }: RequestBody): string {
    const known = this.#digests.get(item)
    if (known !== undefined) return known
    const mac = createCipheriv('aes-256-gcm', this.#digestKey, NONCE).setAAD(bytes.subarray(item.url.start, item.url.end))
    mac.final()
    const digest = mac.getAuthTag().toString('hex')
    this.#digests.set(item, digest)
    return digest
  }

  #hash (...what: ReadonlyArray<string | null>): string {
    return createHmac('sha256', this.#secret).update(JSON.stringify(what)).digest('hex')
  }
}

/** The item's content part with its `uuid`, written anew around the client's bytes: a member that vLLM might read in place of the URL is not in it. */
export function pinnedPart ({ item: { type }, uuid }: Pin): MediaPart | undefined {
  if (uuid === undefined) return undefined
  return { before: `{"type":"${type}","${type}":{"url":"`, after: `"},"uuid":"${uuid}"}` }
}
