/** Turns a stream of tokens into text; text that later tokens may change is held back. */
export interface Detokenizer {
  push (token: number): string
  /** The rest at the end; an unfinished character becomes U+FFFD. */
  flush (): string
}

/** For tokens that are runs of bytes. A character cut by a token boundary is held back until it is complete. */
export class BytesDetokenizer implements Detokenizer {
  readonly #bytesOf: (token: number) => Uint8Array | undefined
  // A byte order mark is ordinary text here.
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true })

  /** `bytesOf` returns undefined for tokens that are no text. */
  constructor (bytesOf: (token: number) => Uint8Array | undefined) {
    this.#bytesOf = bytesOf
  }

  push (token: number): string {
    const bytes = this.#bytesOf(token)
    return bytes === undefined ? '' : this.#decoder.decode(bytes, { stream: true })
  }

  flush (): string {
    return this.#decoder.decode()
  }
}

/** So many tokens without certain text are returned as they are: no character is that long. */
const MAX_HELD = 16

/**
 * For any other tokenizer, whose decoder may look at neighbours (leading spaces, byte fallback): decodes a short window
 * with and without the new token, and returns the difference once it does not end inside a character.
 */
export class TextDetokenizer implements Detokenizer {
  readonly #decode: (tokens: number[]) => string
  #window: number[] = []
  /** Tokens of the window whose text was returned. */
  #given = 0

  constructor (decode: (tokens: number[]) => string) {
    this.#decode = decode
  }

  push (token: number): string {
    this.#window.push(token)
    return this.#take(this.#window.length - this.#given > MAX_HELD)
  }

  flush (): string {
    return this.#take(true)
  }

  #take (all: boolean): string {
    const before = this.#decode(this.#window.slice(0, this.#given))
    const text = this.#decode(this.#window)
    if (!all && text.endsWith('\ufffd')) return ''
    // The next window begins with these tokens, because a decoder looks back no further.
    this.#window = this.#window.slice(this.#given)
    this.#given = this.#window.length
    return text.slice(before.length)
  }
}
