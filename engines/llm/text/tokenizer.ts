import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Tokenizer as HfTokenizer } from '@huggingface/tokenizers'
import { EngineError } from '../../service/errors.ts'
import { loadOptional } from '../../service/optional.ts'
import { BytesDetokenizer, TextDetokenizer, type Detokenizer } from './detokenizer.ts'

type Json = Record<string, unknown>

/** Text to tokens and back. */
export interface Tokenizer {
  /** Special tokens written in the text become those tokens; none are added. */
  encode (text: string): number[]
  /** A stream from tokens to text. `skipSpecial`: special tokens give no text. */
  detokenizer (skipSpecial: boolean): Detokenizer
  /** The bytes of one token, special ones spelled out; empty for an id the vocabulary lacks. */
  bytes (token: number): Uint8Array
  /** A mark of the template or the like, which is no text. */
  isSpecial (token: number): boolean
  /** Tokens that templates may refer to: `bos_token`, `eos_token`, ... */
  readonly specialText: Readonly<Record<string, string>>
  /** Characters of the longest token. */
  readonly longest: number
}

async function readJson (dir: string, file: string): Promise<Json> {
  return JSON.parse(await readFile(join(dir, file), 'utf8')) as Json
}

function specialText (config: Json): Record<string, string> {
  const found: Record<string, string> = {}
  for (const [key, value] of Object.entries(config)) {
    if (!key.endsWith('_token')) continue
    if (typeof value === 'string') found[key] = value
    else if (typeof (value as { content?: unknown } | null)?.content === 'string') found[key] = (value as { content: string }).content
  }
  return found
}

/** True when every token is a run of bytes: then a streaming UTF-8 decoder gives exact text at any token boundary. */
function isByteLevel (tokenizer: Json): boolean {
  const decoder = tokenizer.decoder as { type?: unknown, decoders?: Array<{ type?: unknown }> } | null
  return decoder?.type === 'ByteLevel' || decoder?.decoders?.some(d => d.type === 'ByteLevel') === true
}

/** Characters of the longest token, as the vocabulary spells it: in bytes for byte-level tokens, which are no fewer than characters. */
function longestToken (tokenizer: Json): number {
  const { vocab } = tokenizer.model as { vocab?: Record<string, number> | ReadonlyArray<readonly [string, number]> }
  const added = (tokenizer.added_tokens ?? []) as ReadonlyArray<{ content: string }>
  let longest = 1
  for (const token of Array.isArray(vocab) ? vocab.map(([token]) => token as string) : Object.keys(vocab ?? {})) longest = Math.max(longest, token.length)
  for (const { content } of added) longest = Math.max(longest, content.length)
  return longest
}

/** GPT-2's byte-level alphabet, in which byte-level tokens are spelled: one printable character for each byte. */
function byteLevelAlphabet (): Map<string, number> {
  const bytes = new Map<string, number>()
  let next = 256
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174)
    bytes.set(String.fromCharCode(printable ? byte : next++), byte)
  }
  return bytes
}

const BYTE_OF = byteLevelAlphabet()

/** The bytes a byte-level token stands for; undefined when it is not spelled in that alphabet. */
export function byteLevelBytes (token: string): Uint8Array | undefined {
  const bytes = new Uint8Array(token.length)
  for (let i = 0; i < token.length; i++) {
    const byte = BYTE_OF.get(token[i] as string)
    if (byte === undefined) return undefined
    bytes[i] = byte
  }
  return bytes
}

class ModelTokenizer implements Tokenizer {
  readonly #hf: HfTokenizer
  readonly #special = new Set<number>()
  readonly #added = new Map<number, string>()
  readonly #byteLevel: boolean
  readonly #bytes = new Map<number, Uint8Array>()
  readonly specialText: Readonly<Record<string, string>>
  readonly longest: number

  constructor (hf: HfTokenizer, tokenizer: Json, config: Json) {
    this.#hf = hf
    this.#byteLevel = isByteLevel(tokenizer)
    this.specialText = specialText(config)
    this.longest = longestToken(tokenizer)
    for (const [id, token] of hf.get_added_tokens_decoder()) {
      this.#added.set(id, token.content)
      if (token.special) this.#special.add(id)
    }
  }

  encode (text: string): number[] {
    return [...this.#hf.encode(text, { add_special_tokens: false }).ids]
  }

  bytes (token: number): Uint8Array {
    let bytes = this.#bytes.get(token)
    if (bytes === undefined) this.#bytes.set(token, bytes = this.#spell(token))
    return bytes
  }

  isSpecial (token: number): boolean {
    return this.#special.has(token)
  }

  #spell (token: number): Uint8Array {
    const added = this.#added.get(token)
    if (added !== undefined) return Buffer.from(added)
    if (!this.#byteLevel) return Buffer.from(this.#hf.decode([token], { skip_special_tokens: false }))
    const text = this.#hf.id_to_token(token)
    return text === undefined ? new Uint8Array(0) : byteLevelBytes(text) ?? Buffer.from(text)
  }

  detokenizer (skipSpecial: boolean): Detokenizer {
    if (this.#byteLevel) return new BytesDetokenizer(token => skipSpecial && this.#special.has(token) ? undefined : this.bytes(token))
    return new TextDetokenizer(tokens => this.#hf.decode(tokens, { skip_special_tokens: skipSpecial }))
  }
}

/** Reads tokenizer.json and tokenizer_config.json of a model folder. */
export async function loadTokenizer (dir: string): Promise<{ tokenizer: Tokenizer, config: Json }> {
  const { Tokenizer } = await loadOptional('@huggingface/tokenizers')
  const [tokenizer, config] = await Promise.all([readJson(dir, 'tokenizer.json'), readJson(dir, 'tokenizer_config.json').catch(() => ({}))])
  return { tokenizer: new ModelTokenizer(new Tokenizer(tokenizer, config), tokenizer, config), config }
}

/** Usual text has about four characters a token; a text with more than this many for each token that fits is encoded piece by piece first. */
const USUAL_CHARACTERS = 8
/** Pieces cut anywhere have a few tokens more than the whole text; only a count far above the limit is refused. */
const SURPLUS = 2

/**
 * The tokens of a prompt's text. A text that is far too long is refused after its beginning, because encoding several
 * megabytes would block the event loop for seconds.
 * @throws EngineError `context_length_exceeded`
 */
export function encodeText (tokenizer: Pick<Tokenizer, 'encode'>, text: string, maxLength: number, param: string): number[] {
  const piece = USUAL_CHARACTERS * maxLength
  for (let at = 0, tokens = 0; text.length > piece && at < text.length; at += piece) {
    tokens += tokenizer.encode(text.slice(at, at + piece)).length
    if (tokens > SURPLUS * maxLength) {
      throw new EngineError('context_length_exceeded', `this engine takes ${maxLength} tokens, prompt and output together; the prompt alone has more than ${SURPLUS * maxLength}`, { param })
    }
  }
  return tokenizer.encode(text)
}
