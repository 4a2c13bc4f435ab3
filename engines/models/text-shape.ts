import { ModelError, type GraphSignature, type Json, type TextShape } from './family.ts'
import { object, positiveInteger, tokenIds } from './fields.ts'

const FILE = 'config.json'

/** Where configs keep the language model's numbers: nested in most families, at the top in Qwen2-VL. */
function textConfig (config: Json): Json {
  for (const key of ['text_config', 'llm_config']) if (config[key] !== undefined) return object(config, key, FILE)
  return config
}

/** Dimensions of `past_key_values.0.key` [batch, heads, length, dim] where the graph fixes them. */
function pastShape (decoder: GraphSignature | undefined): { heads?: number, dim?: number } {
  const past = decoder?.inputs.find(input => input.name === 'past_key_values.0.key')
  if (past === undefined) return {}
  const [, heads, , dim] = past.shape
  return { ...(typeof heads === 'number' ? { heads } : {}), ...(typeof dim === 'number' ? { dim } : {}) }
}

/**
 * The language model's dimensions from config.json, checked against the decoder's graph where it was read.
 * @throws ModelError naming the field.
 */
export function readTextShape (config: Json, generation: Json, decoder: GraphSignature | undefined): { hiddenSize: number, text: TextShape } {
  const text = textConfig(config)
  const hiddenSize = positiveInteger(text, 'hidden_size', FILE)
  const layers = positiveInteger(text, 'num_hidden_layers', FILE)
  const heads = positiveInteger(text, 'num_attention_heads', FILE)
  const past = pastShape(decoder)
  const kvHeads = past.heads ?? positiveInteger(text, 'num_key_value_heads', FILE, heads)
  const headDim = past.dim ?? positiveInteger(text, 'head_dim', FILE, hiddenSize / heads)
  if (decoder !== undefined) {
    const found = decoder.inputs.filter(input => /^past_key_values\.\d+\.key$/.test(input.name)).length
    if (found !== layers) throw new ModelError(`onnx/decoder_model_merged.onnx has past inputs for ${found} layers, config.json says ${layers}`)
  }
  const eosIds = [...new Set([generation.eos_token_id, text.eos_token_id, config.eos_token_id].flatMap(tokenIds))]
  return {
    hiddenSize,
    text: {
      layers,
      kvHeads,
      headDim,
      vocab: positiveInteger(text, 'vocab_size', FILE),
      maxPositions: positiveInteger(text, 'max_position_embeddings', FILE),
      eosIds
    }
  }
}
