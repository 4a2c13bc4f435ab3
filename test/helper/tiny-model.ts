/**
 * Runs the shipped model the plain way: one sequence, greedy, on this thread. A yardstick for engines, which must
 * answer the same, and the means to measure the model itself. Prompts and pixels come from engines/models.
 */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Template } from '@huggingface/jinja'
import { Tokenizer } from '@huggingface/tokenizers'
import * as ort from 'onnxruntime-node'
import { loadModel, type ItemShape } from '../../engines/models/index.ts'
import { packageRoot } from './package-root.ts'

export const tinyModelDir = join(packageRoot(), 'engines/models/tiny-internvl')

export interface Part { readonly type: string, readonly text?: string }
export interface Message { readonly role: string, readonly content: string | readonly Part[] }
/** Features of one picture: rows of the vision encoder's output. */
export interface Seen extends ItemShape { readonly rows: Float32Array }
/** Keys and values by layer, flat: key of layer 0, value of layer 0, key of layer 1, ... */
export type Past = ort.Tensor[]
export interface Step { readonly logits: ort.Tensor, readonly present: Past, readonly delta: Past }

export type TinyModel = Awaited<ReturnType<typeof openTinyModel>>

export const image = { type: 'image' }

/** A user's message about pictures: they stand before the question, or after it. */
export function userMessage (text: string, pictures = 0, after = false): Message {
  const images = Array.from({ length: pictures }, () => image)
  return { role: 'user', content: after ? [{ type: 'text', text }, ...images] : [...images, { type: 'text', text }] }
}

export async function openTinyModel (threads = 1) {
  const model = await loadModel(tinyModelDir, { vision: true, decoder: true })
  const readJson = async (file: string) => JSON.parse(await readFile(join(tinyModelDir, file), 'utf8')) as Record<string, unknown>
  const tokenizerConfig = await readJson('tokenizer_config.json')
  const tokenizer = new Tokenizer(await readJson('tokenizer.json'), tokenizerConfig)
  const template = new Template(tokenizerConfig.chat_template as string)
  const open = async (path: string | undefined) =>
    await ort.InferenceSession.create(path as string, { intraOpNumThreads: threads, interOpNumThreads: 1, executionProviders: ['cpu'] })
  const [vision, embed, decoder] = await Promise.all([open(model.files.vision), open(model.files.embed), open(model.files.decoder)])
  const { layers, kvHeads, headDim, vocab, eosIds } = model.text
  const names = Array.from({ length: layers }, (_, i) => [`${i}.key`, `${i}.value`]).flat()

  async function see (bytes: Uint8Array): Promise<Seen> {
    const { inputs, grid, numTokens } = await model.prepare(bytes, {})
    const [pixels] = inputs
    if (pixels === undefined || pixels.tensor.type !== 'float32') throw new Error('one float32 input was expected')
    const out = await vision.run({ [pixels.name]: new ort.Tensor('float32', pixels.tensor.data, pixels.tensor.dims) })
    return { grid, numTokens, rows: out.image_features?.data as Float32Array }
  }

  function prompt (messages: readonly Message[], seen: readonly Seen[]) {
    const text = template.render({ messages, add_generation_prompt: true })
    return model.layoutPrompt(tokenizer.encode(text, { add_special_tokens: false }).ids, seen)
  }

  async function embeddings (ids: readonly number[]): Promise<Float32Array> {
    const out = await embed.run({ input_ids: new ort.Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]) })
    return out.inputs_embeds?.data as Float32Array
  }

  /** `x` is [batch, length, hidden]. */
  async function decode (x: Float32Array, batch: number, mask: readonly number[], positions: readonly number[], past?: Past): Promise<Step> {
    const length = positions.length / batch
    const feeds: Record<string, ort.Tensor> = {
      inputs_embeds: new ort.Tensor('float32', x, [batch, length, model.hiddenSize]),
      attention_mask: new ort.Tensor('int64', BigInt64Array.from(mask, BigInt), [batch, mask.length / batch]),
      position_ids: new ort.Tensor('int64', BigInt64Array.from(positions, BigInt), [batch, length])
    }
    for (const [i, name] of names.entries()) {
      feeds[`past_key_values.${name}`] = past?.[i] ?? new ort.Tensor('float32', new Float32Array(0), [batch, kvHeads, 0, headDim])
    }
    const out = await decoder.run(feeds)
    const tensors = (kind: string) => names.map(name => out[`${kind}.${name}`] as ort.Tensor)
    return { logits: out.logits as ort.Tensor, present: tensors('present'), delta: tensors('delta') }
  }

  /** Embeddings of a prompt, with the pictures' features in their places. */
  async function promptEmbeddings (messages: readonly Message[], seen: readonly Seen[]): Promise<{ x: Float32Array, length: number }> {
    const { ids, mediaSpans } = prompt(messages, seen)
    const x = await embeddings(ids)
    for (const { item, start } of mediaSpans) x.set((seen[item] as Seen).rows, start * model.hiddenSize)
    return { x, length: ids.length }
  }

  function best (logits: ort.Tensor): number {
    const values = (logits.data as Float32Array).subarray(-vocab)
    let at = 0
    for (let i = 1; i < vocab; i++) if ((values[i] as number) > (values[at] as number)) at = i
    return at
  }

  async function answer (messages: readonly Message[], seen: readonly Seen[] = [], maxTokens = 256): Promise<string> {
    const { x, length } = await promptEmbeddings(messages, seen)
    const range = (n: number) => Array.from({ length: n }, (_, i) => i)
    let step = await decode(x, 1, Array<number>(length).fill(1), range(length))
    const out: number[] = []
    for (let at = length; out.length < maxTokens; at++) {
      const token = best(step.logits)
      if (eosIds.includes(token)) break
      out.push(token)
      step = await decode(await embeddings([token]), 1, Array<number>(at + 1).fill(1), [at], step.present)
    }
    return tokenizer.decode(out, { skip_special_tokens: true })
  }

  return {
    model,
    tokenizer,
    template,
    see,
    prompt,
    embeddings,
    promptEmbeddings,
    decode,
    answer,
    /** One question about some pictures. */
    ask: async (question: string, seen: readonly Seen[] = [], after = false) => await answer([userMessage(question, seen.length, after)], seen),
    close: async () => { await Promise.all([vision.release(), embed.release(), decoder.release()]) }
  }
}
