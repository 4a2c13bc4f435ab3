/** Writes a model folder whose vision encoder has InternViT-300M's shape and random weights: for timing, not for seeing. */
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { toFloat16 } from '../../engines/runtime/float16.ts'
import { GraphWriter } from '../helper/onnx.ts'

export interface VitShape {
  readonly layers: number
  readonly width: number
  readonly heads: number
  /** Side of a tile and of a patch, pixels. */
  readonly tile: number
  readonly patch: number
  /** Width of the text model the features go to. */
  readonly hidden: number
  readonly type: 'float32' | 'float16'
  /** Attention as one operator (com.microsoft.MultiHeadAttention), or spelt out as exporters write it. */
  readonly fused: boolean
}

/** InternViT-300M-448px with the projector of InternVL's 1B model. */
export const VIT_300M: VitShape = { layers: 24, width: 1024, heads: 16, tile: 448, patch: 14, hidden: 896, type: 'float16', fused: false }

/** Tokens of a tile after pixel shuffle. */
export function tokensOf ({ tile, patch }: VitShape): number {
  return (tile / patch / 2) ** 2
}

class VitWriter {
  readonly g = new GraphWriter()
  readonly #shape: VitShape
  #state = 0x2545f491

  constructor (shape: VitShape) {
    this.#shape = shape
  }

  /** Random weights of either sign and about the same size; `scale` a power of two. */
  weight (dims: readonly number[], scale: number): string {
    const length = dims.reduce((n, d) => n * d, 1)
    const { type } = this.#shape
    if (type === 'float32') {
      const values = new Float32Array(length)
      for (let i = 0; i < length; i++) values[i] = (this.#next() / 2147483648 - 1) * scale * 2
      return this.g.weight(type, dims, values)
    }
    // A random sign and fraction under one exponent.
    const exponent = toFloat16(scale) & 0x7c00
    const bits = new Uint16Array(length)
    for (let i = 0; i < length; i++) bits[i] = (this.#next() & 0x83ff) | exponent
    return this.g.weight(type, dims, bits)
  }

  constant (dims: readonly number[], value: number): string {
    const length = dims.reduce((n, d) => n * d, 1)
    const { type } = this.#shape
    return this.g.weight(type, dims, type === 'float32' ? new Float32Array(length).fill(value) : new Uint16Array(length).fill(toFloat16(value)))
  }

  linear (x: string, from: number, to: number): string {
    return this.g.node('Add', [this.g.node('MatMul', [x, this.weight([from, to], 1 / Math.sqrt(from) / 2)]), this.weight([to], 2 ** -8)])
  }

  norm (x: string, width: number): string {
    return this.g.node('LayerNormalization', [x, this.constant([width], 1), this.constant([width], 0)], { attributes: { axis: -1, epsilon: { float: 1e-6 } } })
  }

  gelu (x: string): string {
    return this.g.node('Gelu', [x], { domain: 'com.microsoft' })
  }

  #next (): number {
    // xorshift: fast, and the same weights each time.
    this.#state ^= this.#state << 13
    this.#state ^= this.#state >>> 17
    this.#state ^= this.#state << 5
    return this.#state >>> 0
  }
}

function attention (w: VitWriter, x: string, { width, heads, fused }: VitShape): string {
  const { g } = w
  const qkv = w.linear(x, width, 3 * width)
  const split = g.node('Split', [qkv, g.ints([width, width, width])], { attributes: { axis: 2 }, outputs: 3 })
  const parts = [split, `${split}.1`, `${split}.2`]
  if (fused) return g.node('MultiHeadAttention', parts, { attributes: { num_heads: heads }, domain: 'com.microsoft' })
  const size = width / heads
  const [q, k, v] = parts.map((part, i) => g.node('Transpose', [g.node('Reshape', [part, g.ints([0, 0, heads, size])])], { attributes: { perm: i === 1 ? [0, 2, 3, 1] : [0, 2, 1, 3] } })) as [string, string, string]
  const scores = g.node('MatMul', [g.node('Mul', [q, w.constant([1], size ** -0.5)]), k])
  const seen = g.node('MatMul', [g.node('Softmax', [scores], { attributes: { axis: -1 } }), v])
  return g.node('Reshape', [g.node('Transpose', [seen], { attributes: { perm: [0, 2, 1, 3] } }), g.ints([0, 0, width])])
}

function vitGraph (shape: VitShape): GraphWriter {
  const { layers, width, tile, patch, hidden, type } = shape
  const w = new VitWriter(shape)
  const { g } = w
  const side = tile / patch
  const pixels = g.input({ name: 'pixel_values', type, shape: ['tiles', 3, tile, tile] })
  const patches = g.node('Conv', [pixels, w.weight([width, 3, patch, patch], 2 ** -5), w.weight([width], 2 ** -8)], { attributes: { kernel_shape: [patch, patch], strides: [patch, patch] } })
  let x = g.node('Transpose', [g.node('Reshape', [patches, g.ints([0, width, side * side])])], { attributes: { perm: [0, 2, 1] } })
  // A row for the class token in front; its value comes with the positions.
  x = g.node('Pad', [x, g.ints([0, 1, 0, 0, 0, 0]), w.constant([], 0)])
  x = g.node('Add', [x, w.weight([1, side * side + 1, width], 2 ** -6)])
  for (let i = 0; i < layers; i++) {
    const attended = w.linear(attention(w, w.norm(x, width), shape), width, width)
    x = g.node('Add', [x, g.node('Mul', [attended, w.constant([width], 0.1)])])
    const mixed = w.linear(w.gelu(w.linear(w.norm(x, width), width, 4 * width)), 4 * width, width)
    x = g.node('Add', [x, g.node('Mul', [mixed, w.constant([width], 0.1)])])
  }
  x = g.node('Slice', [x, g.ints([1]), g.ints([side * side + 1]), g.ints([1])])
  const half = side / 2
  x = g.node('Transpose', [g.node('Reshape', [x, g.ints([-1, half, 2, half, 2, width])])], { attributes: { perm: [0, 1, 3, 2, 4, 5] } })
  x = w.norm(g.node('Reshape', [x, g.ints([-1, half * half, 4 * width])]), 4 * width)
  x = w.linear(w.gelu(w.linear(x, 4 * width, hidden)), hidden, hidden)
  g.output({ name: 'image_features', type, shape: ['tiles', half * half, hidden] }, x)
  return g
}

/** Fills `dir` and returns it. */
export function writeVitModel (dir: string, shape: VitShape): string {
  const { tile, patch, hidden } = shape
  mkdirSync(join(dir, 'onnx'), { recursive: true })
  writeFileSync(join(dir, 'config.json'), JSON.stringify({
    model_type: 'internvl', image_token_id: 5, text_config: { hidden_size: hidden, num_hidden_layers: 1, num_attention_heads: 14, num_key_value_heads: 2, vocab_size: 64, max_position_embeddings: 4096, eos_token_id: 1 }, vision_config: { image_size: [tile, tile], patch_size: [patch, patch] }
  }))
  writeFileSync(join(dir, 'preprocessor_config.json'), JSON.stringify({ image_seq_length: tokensOf(shape), max_patches: 12, min_patches: 1, size: { height: tile, width: tile }, use_thumbnail: true }))
  writeFileSync(join(dir, 'tokenizer.json'), JSON.stringify({ added_tokens: [{ id: 5, content: '<IMG_CONTEXT>' }] }))
  vitGraph(shape).save(join(dir, 'onnx', 'vision_encoder.onnx'))
  return dir
}
