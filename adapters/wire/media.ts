/** The grammar of content parts, for gateway and engines. */

/** Types of parts that are text, and the member that holds it. */
export const TEXT_PARTS: ReadonlyMap<string, string> = new Map([
  ['text', 'text'], ['input_text', 'text'], ['output_text', 'text'], ['refusal', 'refusal'], ['thinking', 'thinking']
])
