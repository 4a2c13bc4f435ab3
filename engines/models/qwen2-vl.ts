/**
 * Qwen2-VL: a picture keeps its shape and about its size; it is resized to whole patches, every square of patches becomes
 * one token, and the tokens' positions follow the picture's rows and columns (M-RoPE).
 */
import {
  ModelError, PictureError, type FamilyModel, type GraphSignature, type ItemShape, type Json, type ModelFamily, type ModelSource, type PictureSize, type PixelSettings, type PreparedItem
} from './family.ts'
import { pictureSize, positiveInteger } from './fields.ts'
import { makePixels, pixelTensor, readNormaliser, type Normaliser } from './normaliser.ts'
import { patchLength, writePatches, type PatchLayout, mostPixels, smartResize, type PixelBudget } from './qwen2-vl-picture.ts'
import { MAX_ASPECT_RATIO, openPicture } from './picture.ts'
import { mropePositions } from './positions.ts'
import { expandContiguous, readImageToken } from './prompt.ts'

const PREPROCESSOR = 'preprocessor_config.json'
/** What OpenAI's CLIP was trained with. */
const CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073] as const
const CLIP_STD = [0.26862954, 0.26130258, 0.27577711] as const
const MIN_PIXELS = 56 * 56
const MAX_PIXELS = 28 * 28 * 1280

interface Plan extends PatchLayout {
  /** Pixels along a side of the square that becomes one token. */
  readonly factor: number
  readonly budget: PixelBudget
  readonly normaliser: Normaliser
  readonly pixelInput: string
  readonly gridInput: string
}

/** The side of a square or cube in patches or pixels, which configurations give as a number or as [height, width]. */
function sideOf (value: unknown, fallback: number): number {
  return pictureSize(value)?.height ?? fallback
}

/** Published folders say `min_pixels` and `max_pixels`, newer ones `size: { shortest_edge, longest_edge }`, which mean the same. */
function readBudget (preprocessor: Json): PixelBudget {
  const { shortest_edge: shortest, longest_edge: longest } = (preprocessor.size ?? {}) as Json
  const pixels = { min_pixels: preprocessor.min_pixels ?? shortest, max_pixels: preprocessor.max_pixels ?? longest }
  const budget = { min: positiveInteger(pixels, 'min_pixels', PREPROCESSOR, MIN_PIXELS), max: positiveInteger(pixels, 'max_pixels', PREPROCESSOR, MAX_PIXELS) }
  if (budget.min > budget.max) throw new ModelError(`${PREPROCESSOR}: "min_pixels" (${budget.min}) must not be larger than "max_pixels" (${budget.max})`)
  return budget
}

/** The graph's two inputs: of integers, which exports call `grid_thw` or `image_grid_thw`, and of numbers. */
function readInputs (vision: GraphSignature | undefined): { pixelInput: string, gridInput: string } {
  if (vision === undefined) return { pixelInput: 'pixel_values', gridInput: 'grid_thw' }
  const grid = vision.inputs.find(input => input.type === 'int64')
  const pixels = vision.inputs.find(input => input !== grid)
  if (grid === undefined || pixels === undefined) throw new ModelError('onnx/vision_encoder.onnx must take pixel values and, as int64, the grid of a picture (grid_thw)')
  return { pixelInput: pixels.name, gridInput: grid.name }
}

function readPlan (source: ModelSource): Plan {
  const { config, preprocessor } = source
  const { patch_size: patchSize, spatial_merge_size: mergeSize, temporal_patch_size: frames } = (config.vision_config ?? {}) as Json
  const inputs = readInputs(source.vision)
  const patch = positiveInteger(preprocessor, 'patch_size', PREPROCESSOR, sideOf(patchSize, 14))
  const merge = positiveInteger(preprocessor, 'merge_size', PREPROCESSOR, sideOf(mergeSize, 2))
  return {
    patch,
    merge,
    frames: positiveInteger(preprocessor, 'temporal_patch_size', PREPROCESSOR, sideOf(frames, 2)),
    factor: patch * merge,
    budget: readBudget(preprocessor),
    normaliser: readNormaliser(source, inputs.pixelInput, CLIP_MEAN, CLIP_STD),
    ...inputs
  }
}

/** The size a request asks for, where it asks for one. */
function askedSize ({ factor, budget }: Plan, size: PictureSize, settings: PixelSettings): PictureSize | undefined {
  const { min_pixels: min, max_pixels: max, resized_height: height, resized_width: width } = settings
  if (height !== undefined && width !== undefined) {
    if (Math.max(width, height) / Math.min(width, height) > MAX_ASPECT_RATIO) {
      throw new PictureError(`the picture can't be resized to ${width}x${height} pixels: sides may differ by a factor of ${MAX_ASPECT_RATIO}`)
    }
    return smartResize({ width, height }, factor, budget)
  }
  if (min === undefined && max === undefined) return undefined
  return smartResize(size, factor, { min: min ?? budget.min, max: max ?? budget.max })
}

/** The size a picture is resized to. The model's own budget holds also for what a request asks for, as in LMDeploy. */
function targetSize (plan: Plan, size: PictureSize, settings: PixelSettings): PictureSize {
  return smartResize(askedSize(plan, size, settings) ?? size, plan.factor, plan.budget)
}

function shapeOf ({ patch, merge }: Plan, { width, height }: PictureSize): ItemShape & { readonly patches: number } {
  const grid = [1, height / patch, width / patch] as const
  const patches = grid[1] * grid[2]
  return { grid, patches, numTokens: patches / merge ** 2 }
}

async function prepare (plan: Plan, bytes: Uint8Array, settings: PixelSettings, signal?: AbortSignal): Promise<PreparedItem> {
  const picture = await openPicture(bytes)
  signal?.throwIfAborted()
  const size = targetSize(plan, picture.size, settings)
  const { grid, patches, numTokens } = shapeOf(plan, size)
  const rgb = await picture.resize(size)
  signal?.throwIfAborted()
  const width = patchLength(plan)
  const pixels = makePixels(plan.normaliser, patches * width)
  writePatches(rgb, size, plan, plan.normaliser, pixels)
  return {
    grid,
    numTokens,
    units: 1,
    // Public exports of this family were traced with one picture, and take no second one though the grid has rows for it.
    alone: true,
    inputs: [
      { name: plan.pixelInput, batchAxis: 0, tensor: pixelTensor(pixels, [patches, width]) },
      { name: plan.gridInput, batchAxis: 0, tensor: { type: 'int64', dims: [1, 3], data: BigInt64Array.from(grid, BigInt) } }
    ]
  }
}

function open (source: ModelSource): FamilyModel {
  const plan = readPlan(source)
  const { factor, merge, budget } = plan
  const { config, specialTokens } = source
  const { imageTokenId, imageToken } = readImageToken(source, config.image_token_id ?? specialTokens['<|image_pad|>'])
  const markers = { start: specialTokens['<|vision_start|>'], end: specialTokens['<|vision_end|>'] }
  return {
    imageTokenId,
    imageToken,
    maxTokensPerItem: Math.floor(mostPixels(factor, budget) / factor ** 2),
    tokensFor: (size, settings = {}) => {
      const { grid, numTokens } = shapeOf(plan, targetSize(plan, size, settings))
      return { grid, numTokens }
    },
    fits: ({ grid, numTokens }) => {
      const [frames = 0, height = 0, width = 0] = grid
      return grid.length === 3 && frames === 1 && height >= merge && width >= merge && height % merge === 0 && width % merge === 0 && numTokens === height * width / merge ** 2
    },
    prepare: (bytes, settings, signal) => prepare(plan, bytes, settings, signal),
    layoutPrompt: (ids, items) => expandContiguous(ids, items, imageTokenId, markers),
    positions: (ids, spans, items) => mropePositions(ids.length, spans, items, merge)
  }
}

export const qwen2vl: ModelFamily = { name: 'qwen2-vl', modelTypes: ['qwen2_vl'], open }
