const [QUOTE, COMMA, MINUS, OPEN, ESCAPE, CLOSE] = [0x22, 0x2c, 0x2d, 0x5b, 0x5c, 0x5d] as const

/**
 * Does the `prompt` of a completion hold several prompts? A prompt is a text or an array of token ids; an array of either
 * holds one for each. Looks at the beginning and the first prompt only: a prompt may be megabytes long.
 *
 * @param json a value that is known to be JSON
 */
export function severalPrompts (json: Buffer): boolean {
  if (json[0] !== OPEN) return false
  const first = skipSpace(json, 1)
  const code = json[first]!
  if (code === CLOSE || code === MINUS || isDigit(code)) return false
  if (code !== QUOTE && code !== OPEN) return true
  // Token ids are numbers: the first closing bracket ends the array.
  const end = code === QUOTE ? endOfText(json, first + 1) : json.indexOf(CLOSE, first)
  return json[skipSpace(json, end + 1)] === COMMA
}

function endOfText (json: Buffer, from: number): number {
  let at = from
  while (json[at] !== QUOTE) at += json[at] === ESCAPE ? 2 : 1
  return at
}

function skipSpace (json: Buffer, from: number): number {
  let at = from
  while (json[at]! <= 0x20) at++
  return at
}

function isDigit (code: number): boolean {
  return code >= 0x30 && code <= 0x39
}
