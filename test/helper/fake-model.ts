/** Writes a model folder small enough to understand: an InternVL whose vision graph takes means of patches and mixes them. */
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { toFloat16 } from '../../engines/runtime/index.ts'
import { GraphWriter } from './onnx.ts'

/** Side of a tile, pixels. */
export const TILE = 16
/** Tokens of a tile: its quarters. */
const TOKENS = 4
const HIDDEN = 8

export interface FakeModelOptions {
  /** Of pixels and features. */
  readonly type?: 'float32' | 'float16'
  /** Multiplies the work of one run. */
  readonly width?: number
}

function weights (type: 'float32' | 'float16', length: number, seed: number): Float32Array | Uint16Array {
  // Fixed numbers of a small generator: the same model each time.
  let state = seed
  const next = (): number => {
    state = (state * 1103515245 + 12345) % 2147483648
    return state / 1073741824 - 1
  }
  const values = Float32Array.from({ length }, next)
  return type === 'float32' ? values : Uint16Array.from(values, toFloat16)
}

function visionGraph ({ type = 'float32', width = 64 }: FakeModelOptions): GraphWriter {
  const g = new GraphWriter()
  const side = TILE / 2
  const pixels = g.input({ name: 'pixel_values', type, shape: ['tiles', 3, TILE, TILE] })
  const patch = g.node('Conv', [pixels, g.weight(type, [width, 3, side, side], weights(type, width * 3 * side * side, 1))], { attributes: { kernel_shape: [side, side], strides: [side, side] } })
  const tokens = g.node('Transpose', [g.node('Reshape', [patch, g.ints([0, width, TOKENS])])], { attributes: { perm: [0, 2, 1] } })
  const mixed = g.node('Tanh', [g.node('MatMul', [tokens, g.weight(type, [width, width], weights(type, width * width, 2))])])
  g.output({ name: 'image_features', type, shape: ['tiles', TOKENS, HIDDEN] }, g.node('MatMul', [mixed, g.weight(type, [width, HIDDEN], weights(type, width * HIDDEN, 3))]))
  return g
}

const CONFIG = {
  model_type: 'internvl',
  image_token_id: 5,
  image_seq_length: TOKENS,
  text_config: { model_type: 'qwen2', hidden_size: HIDDEN, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 64, max_position_embeddings: 512, eos_token_id: 1 },
  vision_config: { image_size: [TILE, TILE], patch_size: [4, 4] }
}

const PREPROCESSOR = {
  image_mean: [0.485, 0.456, 0.406], image_std: [0.229, 0.224, 0.225], image_seq_length: TOKENS, max_patches: 4, min_patches: 1, rescale_factor: 1 / 255, size: { height: TILE, width: TILE }, use_thumbnail: true
}

const TOKENIZER = { added_tokens: [{ id: 1, content: '<end>' }, { id: 3, content: '<img>' }, { id: 4, content: '</img>' }, { id: 5, content: '<IMG_CONTEXT>' }] }

/** Fills `dir` and returns it. There is no decoder in it. */
export function fakeModel (dir: string, options: FakeModelOptions = {}): string {
  mkdirSync(join(dir, 'onnx'), { recursive: true })
  writeFileSync(join(dir, 'config.json'), JSON.stringify(CONFIG))
  writeFileSync(join(dir, 'preprocessor_config.json'), JSON.stringify(PREPROCESSOR))
  writeFileSync(join(dir, 'tokenizer.json'), JSON.stringify(TOKENIZER))
  visionGraph(options).save(join(dir, 'onnx', 'vision_encoder.onnx'))
  return dir
}
