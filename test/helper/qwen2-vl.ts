/** The folder of a second family: a small Qwen2-VL with random weights, and what PyTorch makes of it (test/fixtures/qwen2-vl-random/export). */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { packageRoot } from './package-root.ts'

export const qwenModelDir = join(packageRoot(), 'test/fixtures/qwen2-vl-random')

type Part = { readonly type: 'text', readonly text: string } | { readonly type: 'image', readonly picture: string }

/** One prompt, how transformers lays it out, and the tokens PyTorch answers greedily, without regard to the end token. */
export interface ReferencePrompt {
  readonly messages: ReadonlyArray<{ readonly role: string, readonly content: string | readonly Part[] }>
  readonly ids: readonly number[]
  /** Of each picture: [1, height, width] in patches. */
  readonly grids: ReadonlyArray<readonly number[]>
  /** Temporal, height, width. */
  readonly positions: ReadonlyArray<readonly number[]>
  readonly next: number
  readonly tokens: readonly number[]
  /** Smallest difference of the two largest logits in any step. */
  readonly margin: number
}

/** One picture as transformers' image processor prepares it. */
export interface ReferencePicture {
  readonly width: number
  readonly height: number
  readonly grid: readonly number[]
  readonly resized: boolean
  readonly shape: readonly number[]
  /** Every `stride`th number of the pixel values. */
  readonly stride: number
  readonly sample: readonly number[]
  readonly mean: number
  readonly std: number
}

export interface QwenReference {
  readonly prompts: Readonly<Record<string, ReferencePrompt>>
  readonly pictures: Readonly<Record<string, ReferencePicture>>
  /** Width, height, min_pixels, max_pixels -> width, height. */
  readonly sizes: ReadonlyArray<readonly [number, number, number, number, number, number]>
}

export const reference = JSON.parse(readFileSync(join(qwenModelDir, 'reference', 'reference.json'), 'utf8')) as QwenReference

export function pictureBytes (name: string): Buffer {
  return readFileSync(join(qwenModelDir, 'reference', `${name}.png`))
}

export function pictureUrl (name: string): string {
  return `data:image/png;base64,${pictureBytes(name).toString('base64')}`
}

/** The prompt as a chat request: `urlOf` says where a picture is. */
export function chatBody ({ messages, tokens }: ReferencePrompt, urlOf: (picture: string) => string = pictureUrl): { messages: object[], [field: string]: unknown } {
  const part = (part: Part): object => part.type === 'text' ? part : { type: 'image_url', image_url: { url: urlOf(part.picture) } }
  return {
    model: 'qwen2-vl-random',
    messages: messages.map(({ role, content }) => ({ role, content: typeof content === 'string' ? content : content.map(part) })),
    temperature: 0,
    max_tokens: tokens.length,
    ignore_eos: true,
    logprobs: true
  }
}

/** Tokens a picture's grid becomes: one a square of 2 x 2 patches. */
export function tokensOf (grid: readonly number[]): number {
  return grid.reduce((product, side) => product * side, 1) / 4
}

/** Names of a prompt's pictures in order. */
export function picturesOf ({ messages }: ReferencePrompt): string[] {
  return messages.flatMap(({ content }) => typeof content === 'string' ? [] : content.flatMap(part => part.type === 'image' ? [part.picture] : []))
}
