import { refuse, type Body } from './fields.ts'

const MAX_PROMPTS = 128

type Encode = (text: string) => number[]

function isIds (value: unknown, vocab: number): value is number[] {
  return Array.isArray(value) && value.length > 0 && value.every(id => Number.isSafeInteger(id) && (id as number) >= 0 && (id as number) < vocab)
}

/** How many prompts a request has, before any of them is read. @throws EngineError `invalid_request` */
export function countPrompts ({ prompt }: Body): number {
  const count = Array.isArray(prompt) && typeof prompt[0] !== 'number' ? prompt.length : 1
  if (count < 1 || count > MAX_PROMPTS) refuse('prompt', `"prompt" must hold 1 to ${MAX_PROMPTS} prompts`)
  return count
}

/**
 * The prompts of /v1/completions: a text, token ids, or a list of either.
 * @throws EngineError `invalid_request`
 */
export function readPrompts (body: Body, vocab: number, encode: Encode): number[][] {
  const { prompt } = body
  const list: unknown[] = Array.isArray(prompt) && typeof prompt[0] !== 'number' ? prompt : [prompt]
  return list.map((one, i) => {
    const param = list.length === 1 ? 'prompt' : `prompt[${i}]`
    if (typeof one === 'string' && one !== '') return encode(one)
    if (isIds(one, vocab)) return one
    return refuse(param, `"${param}" must be a non-empty text or a list of token ids below ${vocab}`)
  })
}
