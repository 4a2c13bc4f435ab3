/** Runs in a worker of its own: renders and tokenises prompts that are too long to do so between two events. */
import type { CreateProgram } from '../../runtime/index.ts'
import { EngineError, type EngineErrorCode } from '../../service/errors.ts'
import { ChatTemplate, type TemplateMessage } from './chat-template.ts'
import { encodeText, loadTokenizer } from './tokenizer.ts'

/** Messages to be rendered, or a text as it stands. */
export interface TextJob {
  readonly input: string | { readonly messages: readonly TemplateMessage[], readonly kwargs: Readonly<Record<string, unknown>> }
  readonly maxLength: number
  readonly param: string
}

/** Errors of requests as data: classes do not cross threads. */
export type TextResult = { readonly tokens: Int32Array } | { readonly error: { readonly code: EngineErrorCode, readonly message: string, readonly param: string | undefined } }

export type TextMethods = {
  encode (job: TextJob): TextResult
}

export const create: CreateProgram<string, TextMethods> = async ({ data: dir }) => {
  const { tokenizer, config } = await loadTokenizer(dir)
  const template = await ChatTemplate.load(dir, config, tokenizer.specialText)
  return {
    encode: ({ input, maxLength, param }) => {
      try {
        const text = typeof input === 'string' ? input : template.render(input.messages, input.kwargs)
        return { tokens: Int32Array.from(encodeText(tokenizer, text, maxLength, param)) }
      } catch (err) {
        if (!EngineError.is(err)) throw err
        return { error: { code: err.code, message: err.message, param: err.param } }
      }
    }
  }
}
