import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Template } from '@huggingface/jinja'
import { EngineError } from '../../service/errors.ts'
import { loadOptional } from '../../service/optional.ts'
import { toolFormatOf, type ToolFormat } from './tool-calls.ts'

/** A message as templates of vision-language models expect it. */
export interface TemplateMessage {
  readonly role: string
  /** Calls of an assistant, as templates print them: with their arguments parsed. */
  readonly tool_calls?: ReadonlyArray<{ readonly type: 'function', readonly id: string, readonly function: { readonly name: string, readonly arguments: Readonly<Record<string, unknown>> } }>
  /** The call that a tool's message answers. */
  readonly tool_call_id?: string
  readonly content: string | ReadonlyArray<{ readonly type: 'text', readonly text: string } | { readonly type: 'image' }>
}

/** The template's source: in tokenizer_config.json (alone, or by name), or in a file of its own. */
async function source (dir: string, config: Record<string, unknown>): Promise<string | undefined> {
  const { chat_template: template } = config
  if (typeof template === 'string') return template
  if (Array.isArray(template)) {
    const named = template as Array<{ name?: unknown, template?: unknown }>
    const found = named.find(t => t.name === 'default') ?? named[0]
    if (typeof found?.template === 'string') return found.template
  }
  const jinja = await readFile(join(dir, 'chat_template.jinja'), 'utf8').catch(() => undefined)
  if (jinja !== undefined) return jinja
  const json = await readFile(join(dir, 'chat_template.json'), 'utf8').catch(() => undefined)
  const parsed = json === undefined ? undefined : JSON.parse(json) as { chat_template?: unknown }
  return typeof parsed?.chat_template === 'string' ? parsed.chat_template : undefined
}

/** A model's chat template, parsed once. */
export class ChatTemplate {
  readonly #template: Template | undefined
  readonly toolFormat: ToolFormat
  readonly #specialText: Readonly<Record<string, string>>

  private constructor (template: Template | undefined, toolFormat: ToolFormat, specialText: Readonly<Record<string, string>>) {
    this.#template = template
    this.toolFormat = toolFormat
    this.#specialText = specialText
  }

  static async load (dir: string, config: Record<string, unknown>, specialText: Readonly<Record<string, string>>): Promise<ChatTemplate> {
    const { Template } = await loadOptional('@huggingface/jinja')
    const text = await source(dir, config)
    return new ChatTemplate(text === undefined ? undefined : new Template(text), toolFormatOf(text ?? ''), specialText)
  }

  /**
   * The prompt's text, ready for the assistant's answer.
   * @throws EngineError `unsupported` when the model has no template, `invalid_request` when it refuses these messages.
   */
  render (messages: readonly TemplateMessage[], kwargs: Readonly<Record<string, unknown>> = {}): string {
    if (this.#template === undefined) throw new EngineError('unsupported', 'this model has no chat template; use /v1/completions')
    try {
      return this.#template.render({ ...this.#specialText, add_generation_prompt: true, ...kwargs, messages })
    } catch (err) {
      throw new EngineError('invalid_request', `the model's chat template refuses these messages: ${(err as Error).message}`, { param: 'messages', cause: err })
    }
  }
}
