import { randomUUID } from 'node:crypto'
import type { ChatAnswer } from '../../service/engine-service.ts'
import type { LoadedModel } from '../../models/family.ts'
import type { Outcome } from '../sequence/sequence.ts'
import type { Generation } from './generation.ts'
import type { AnswerHead, AnswerShape } from './shape.ts'
import type { ToolCall } from '../text/tool-calls.ts'
import type { SampledToken } from '../sequence/sampling.ts'

/** `prefix`: of the id. */
export function answerHead (prefix: string, model: LoadedModel): AnswerHead {
  return {
    id: `${prefix}${randomUUID().replaceAll('-', '')}`,
    created: Math.floor(Date.now() / 1000),
    model: model.name,
    system_fingerprint: `fp_${model.fingerprint.slice(0, 10)}`
  }
}

/** Server-sent events; all events since the last read go out in one chunk. */
async function * stream (generation: Generation, shape: AnswerShape): AsyncGenerator<Buffer> {
  const opened = new Set<number>()
  for await (const events of generation.events()) {
    let out = ''
    for (const event of events) {
      if (!opened.has(event.index)) {
        opened.add(event.index)
        out += shape.opening(event.index) ?? ''
      }
      out += shape.piece(event.index, event.text, event.type === 'token' ? event.token : undefined, event.calls) ?? ''
      if (event.type === 'end') out += shape.closing(event.index, event.outcome)
    }
    if (out !== '') yield Buffer.from(out)
  }
  yield Buffer.from(shape.end(() => generation.usage()))
}

async function collect (generation: Generation, shape: AnswerShape): Promise<object> {
  const choices = generation.choices.map(() => ({ text: '', calls: [] as ToolCall[], tokens: [] as SampledToken[], outcome: undefined as unknown as Outcome }))
  for await (const events of generation.events()) {
    for (const event of events) {
      const choice = choices[event.index] as typeof choices[number]
      choice.text += event.text
      if (event.calls !== undefined) choice.calls.push(...event.calls)
      if (event.type === 'token') choice.tokens.push(event.token)
      else choice.outcome = event.outcome
    }
  }
  return shape.whole(choices, generation.usage())
}

/** The answer of submitted sequences. @throws what they fail with before the first token. */
export async function answer (generation: Generation, shape: AnswerShape, options: { stream: boolean }): Promise<ChatAnswer> {
  if (!options.stream) return { status: 200, json: await collect(generation, shape) }
  await generation.started()
  return { status: 200, stream: stream(generation, shape) }
}
