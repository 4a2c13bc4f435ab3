/**
 * What a model family is. Engines know models by this file only: a family turns a picture into the vision program's
 * inputs, says how a prompt is laid out around it, and gives position ids. One family, one file, listed in families.ts.
 *
 * Three kinds of model shaped it. InternVL: tiles, tokens a multiple of the tiles, one span per picture, plain positions.
 * Qwen2-VL: patches plus `image_grid_thw` as a second input, tokens by resolution, three-axis positions (M-RoPE).
 * Idefics3/SmolVLM: tiles in dimension 1 with a pixel mask beside them, and a picture's tokens in several spans with
 * row and column markers between.
 */
import type { Json } from '../../adapters/wire/json.ts'
import type { TensorData, TensorSpec } from '../runtime/types.ts'

/** Pixels. */
export interface PictureSize {
  readonly width: number
  readonly height: number
}

/** Per-item settings a request may give, validated and canonical. What a family does not know it ignores. */
export interface PixelSettings {
  /** InternVL: at most so many tiles, thumbnail not counted. */
  readonly max_dynamic_patch?: number
  readonly min_pixels?: number
  readonly max_pixels?: number
  readonly resized_height?: number
  readonly resized_width?: number
}

/**
 * How one item is cut and how many tokens it becomes. `grid` means what the family says (InternVL: [columns, rows];
 * Qwen2-VL: [t, h, w]) and travels with the features, because prompt layout and positions need it.
 */
export interface ItemShape {
  readonly grid: readonly number[]
  readonly numTokens: number
}

/**
 * One input of the vision graph for one item. Items are batched by joining their data end to end and adding up
 * `dims[batchAxis]`; all dimensions before it are 1.
 */
export interface VisionInput {
  readonly name: string
  readonly tensor: TensorData
  readonly batchAxis: number
}

/** An item ready for the vision graph. Its features are the next `numTokens` rows of the output. */
export interface PreparedItem extends ItemShape {
  readonly inputs: readonly VisionInput[]
  /** Share of a batch in the family's unit of work (InternVL: tiles, Qwen2-VL: pictures); engines bound the sum per run. */
  readonly units: number
  /** The graph takes one item a run: this one shares a run with no other. */
  readonly alone?: boolean
}

/** What an item's place in a prompt needs to know of it. */
export type PlacedItem = ItemShape

/** Tokens `[start, start + length)` of the prompt take rows `[offset, offset + length)` of item `item`'s features. */
export interface MediaSpan {
  readonly item: number
  readonly start: number
  readonly length: number
  readonly offset: number
}

export interface PromptLayout {
  readonly ids: number[]
  /** In order of `start`. */
  readonly mediaSpans: MediaSpan[]
}

export interface Positions {
  /** 1, or 3 for M-RoPE (temporal, height, width). */
  readonly axes: 1 | 3
  /** `axes` rows of `ids.length` values, one row after the other. */
  readonly values: Int32Array
  /** Position of the first generated token on every axis; each further one adds 1. */
  readonly next: number
}

/** Names of a model's graphs as they lie in `onnx/`. A graph that was not asked for is undefined. */
export interface ModelFiles {
  readonly vision: string | undefined
  readonly embed: string | undefined
  readonly decoder: string | undefined
}

/** Inputs and outputs by graph, read from the files without loading weights. */
export interface GraphSignature {
  readonly inputs: readonly TensorSpec[]
  readonly outputs: readonly TensorSpec[]
}

export interface TextShape {
  readonly layers: number
  readonly kvHeads: number
  readonly headDim: number
  readonly vocab: number
  /** Longest sequence, prompt and answer together, in tokens. */
  readonly maxPositions: number
  readonly eosIds: readonly number[]
}

/** A JSON object of a model folder. */
export type { Json }

/** Everything a family may read. Plain data, so that it can be handed to a worker. */
export interface ModelSource {
  readonly dir: string
  readonly config: Json
  /** preprocessor_config.json */
  readonly preprocessor: Json
  /** Ids by text from tokenizer.json: added tokens, and those of the family's `vocabulary`. */
  readonly specialTokens: Readonly<Record<string, number>>
  readonly vision: GraphSignature | undefined
}

/** A family bound to one model's configuration. Pure but for `prepare`, which decodes pictures in sharp's threads. */
export interface FamilyModel {
  /** The token that stands for media in a prompt, once per item before expansion and once per feature row after it. */
  readonly imageTokenId: number
  readonly imageToken: string
  /** Most rows of features one item can have. */
  readonly maxTokensPerItem: number
  tokensFor (size: PictureSize, settings?: PixelSettings): ItemShape
  /** Could `shape` be the shape of an item? Checks what came over the wire before blocks are read by it. */
  fits (shape: ItemShape): boolean
  /**
   * Decodes, cuts, resizes and normalises one picture. Normalising is plain JavaScript: call it in a worker.
   * @throws PictureError when the bytes are no picture this reads, or too big a one.
   */
  prepare (bytes: Uint8Array, settings: PixelSettings, signal?: AbortSignal): Promise<PreparedItem>
  /**
   * Replaces each placeholder token by what the item needs.
   * @throws when placeholders and items differ in number.
   */
  layoutPrompt (ids: readonly number[], items: readonly PlacedItem[]): PromptLayout
  positions (ids: readonly number[], spans: readonly MediaSpan[], items: readonly PlacedItem[]): Positions
}

export interface ModelFamily {
  readonly name: string
  /** Values of `model_type` in config.json. */
  readonly modelTypes: readonly string[]
  /** Entries of the tokenizer's vocabulary it needs besides added tokens, such as the line break between rows of tiles. */
  readonly vocabulary?: readonly string[]
  /** @throws ModelError naming file and field when the configuration lacks something. */
  open (source: ModelSource): FamilyModel
}

/** What `loadModel` gives: a folder read, a family bound, nothing opened that wasn't asked for. */
export interface LoadedModel extends FamilyModel {
  readonly dir: string
  /** Name clients use: the folder's name unless given. */
  readonly name: string
  readonly family: string
  readonly config: Json
  readonly generationConfig: Json
  readonly source: ModelSource
  /** sha-256 (hex) over config.json, preprocessor_config.json and tokenizer.json. Engines exchange features only when equal. */
  readonly fingerprint: string
  /** sha-256 (hex) of the vision graph and its weights; undefined without vision. Part of the content hash. */
  readonly visionIdentity: string | undefined
  /** Columns of a feature row, equal to the text model's width. */
  readonly hiddenSize: number
  /** Element type of features, as the graphs have it. */
  readonly dtype: 'float32' | 'float16'
  readonly files: ModelFiles
  readonly graphs: { readonly vision: GraphSignature | undefined, readonly embed: GraphSignature | undefined, readonly decoder: GraphSignature | undefined }
  readonly text: TextShape
}

export interface LoadModelOptions {
  /** Read the vision encoder's signature; its file must exist. */
  readonly vision: boolean
  /** Read the embedding's and decoder's; their files must exist. Without it they are not even opened. */
  readonly decoder: boolean
  readonly name?: string | undefined
  /** Suffix of the graph files, as transformers.js names them: `fp16` reads `vision_encoder_fp16.onnx`. */
  readonly variant?: string | undefined
}

/** The model folder is not usable; the message names the file and what is wrong with it. */
export class ModelError extends Error {
  override readonly name = 'ModelError'
}

/** A picture can't be used; the message says why and is fit for the client. */
export class PictureError extends Error {
  override readonly name = 'PictureError'
}

/** Rows of features in one block, in every engine: both ends of a link must agree. */
export const FEATURE_BLOCK_TOKENS = 32

export interface FeatureBlockShape {
  readonly blockTokens: number
  readonly hiddenSize: number
  readonly dtype: 'float32' | 'float16'
  readonly blockBytes: number
}

/** Shape of this model's feature blocks. */
export function featureBlockShape (model: Pick<LoadedModel, 'hiddenSize' | 'dtype'>, blockTokens = FEATURE_BLOCK_TOKENS): FeatureBlockShape {
  const { hiddenSize, dtype } = model
  return { blockTokens, hiddenSize, dtype, blockBytes: blockTokens * hiddenSize * (dtype === 'float16' ? 2 : 4) }
}

/** Blocks that `numTokens` rows of features take. */
export function featureBlocksFor (numTokens: number, blockTokens = FEATURE_BLOCK_TOKENS): number {
  return Math.ceil(numTokens / blockTokens)
}
