import { pictureMaker, type Pictures } from './pictures.ts'
import { seeded, type Random } from './random.ts'

export interface WorkloadOptions {
  readonly model: string
  readonly seed: number
  /** Of each request that has any. */
  readonly pictures: number
  readonly width: number
  readonly height: number
  readonly format: 'png' | 'jpeg'
  /** 0 to 1: how many of the pictures were sent before. */
  readonly repeat: number
  /** 0 to 1: how many of the requests have text only. */
  readonly textShare: number
  /** Words of the prompt, which are about as many tokens. */
  readonly promptTokens: number
  readonly maxTokens: number
  readonly ignoreEos: boolean
  /** Asks for `usage` at the end of the stream. */
  readonly usage: boolean
  /** Members that each body gets beside its own, or in their place. */
  readonly body: Readonly<Record<string, unknown>>
}

export interface PreparedRequest {
  readonly pictures: number
  /** How many of them were sent before. */
  readonly repeated: number
  readonly body: Buffer
}

/** Repeated pictures are among the last so many different ones. */
const REMEMBERED = 64
/** Short and frequent: one token each in most vocabularies. */
const WORDS = ('the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what all were we when your can said there use an each which she do how ' +
  'their if will up other about out many then them these so some her would make like him into time has look two more write go see number no way could people my than first water been call who oil its now').split(' ')

/** The requests of a load, one after the other: the same at each run with the same options. */
export class Workload {
  readonly #options: WorkloadOptions
  readonly #random: Random
  readonly #picture: Pictures
  /** Numbers of the pictures sent last. */
  readonly #sent: number[] = []
  #next = 0

  private constructor (options: WorkloadOptions, picture: Pictures) {
    this.#options = options
    this.#random = seeded(options.seed, 1)
    this.#picture = picture
  }

  /** @throws Error when such pictures can't be made */
  static async create (options: WorkloadOptions): Promise<Workload> {
    return new Workload(options, await pictureMaker({ ...options, seed: options.seed ^ 0x51ed270b }))
  }

  async next (): Promise<PreparedRequest> {
    // What the request has is decided before anything is waited for, so that the order of completion alters nothing.
    const text = this.#random() < this.#options.textShare
    const chosen = text ? [] : Array.from({ length: this.#options.pictures }, () => this.#choose())
    const prompt = this.#prompt()
    const urls = await Promise.all(chosen.map(({ id }) => this.#picture(id)))
    return { pictures: chosen.length, repeated: chosen.filter(({ repeated }) => repeated).length, body: this.#body(prompt, urls) }
  }

  #choose (): { id: number, repeated: boolean } {
    if (this.#sent.length > 0 && this.#random() < this.#options.repeat) return { id: this.#sent[Math.floor(this.#random() * this.#sent.length)]!, repeated: true }
    const id = this.#next++
    this.#sent.push(id)
    if (this.#sent.length > REMEMBERED) this.#sent.shift()
    return { id, repeated: false }
  }

  /** No two begin alike: a prefix cache finds nothing. */
  #prompt (): string {
    return Array.from({ length: this.#options.promptTokens }, () => WORDS[Math.floor(this.#random() * WORDS.length)]).join(' ')
  }

  #body (prompt: string, urls: readonly string[]): Buffer {
    const { model, maxTokens, ignoreEos, usage, body } = this.#options
    const content = urls.length === 0 ? prompt : [...urls.map(url => ({ type: 'image_url', image_url: { url } })), { type: 'text', text: prompt }]
    return Buffer.from(JSON.stringify({
      model,
      max_tokens: maxTokens,
      stream: true,
      ...(usage ? { stream_options: { include_usage: true } } : {}),
      ...(ignoreEos ? { ignore_eos: true } : {}),
      messages: [{ role: 'user', content }],
      ...body
    }))
  }
}
