/** Requests of every kind, for comparing engines with each other. */
import { drawScene } from '../helper/scenes.ts'
import { pictureParts, user, type Completion } from './harness.ts'

export interface MixedRequest {
  readonly urls: readonly string[]
  readonly text: string
  readonly more: object
}

const QUESTIONS = ['How many circles are there?', 'What colour is the square?', 'Describe the picture.', 'How are you?', 'Is there a red star?']

/** Text only and 1 to 4 pictures, short and long prompts, short answers and forced long ones; all greedy. */
export async function mixedRequests (count: number, distinctPictures: number): Promise<MixedRequest[]> {
  const pictures = await Promise.all(Array.from({ length: distinctPictures }, (_, seed) => drawScene(seed + 1)))
  return Array.from({ length: count }, (_, i) => {
    const urls = Array.from({ length: i % 5 }, (_, k) => pictures[(i * 3 + k) % pictures.length] as string)
    const padding = i % 4 === 3 ? 'This is a long story about nothing much at all. '.repeat(4 + i % 7) : ''
    const more = i % 3 === 1 ? { ignore_eos: true, max_tokens: 40 + i % 30, skip_special_tokens: false } : { max_tokens: 64 }
    return { urls, text: padding + QUESTIONS[i % QUESTIONS.length], more: { temperature: 0, ...more } }
  })
}

/** All of an answer that must be equal. */
export function outcome (answer: Completion): string {
  const [choice] = answer.choices
  return `${choice?.finish_reason}, ${answer.usage.completion_tokens} tokens: ${choice?.message.content}`
}

/** The request with its pictures, for an engine with vision weights. */
export function bodyOf ({ urls, text, more }: MixedRequest): object {
  return { messages: [user(urls.length === 0 ? text : pictureParts(urls, text))], ...more }
}
