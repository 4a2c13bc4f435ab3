import { EngineError } from '../../service/errors.ts'
import type { Tokenizer } from './tokenizer.ts'

/** A prompt that fits has about four characters to a token; one with more than this to each is looked at before it is encoded. */
const USUAL_CHARACTERS = 8
/** Cut anywhere, a text has a few tokens more: nothing is refused for those. */
const SURPLUS = 2

/**
 * The tokens of a prompt's text. One that is far too long is refused after its beginning: encoding all of several megabytes
 * would hold up everybody else for seconds.
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
