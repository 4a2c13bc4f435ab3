import { ModelError, type FamilyModel, type ItemShape, type ModelFamily, type ModelSource, type PictureSize, type PixelSettings, type PreparedItem } from './family.ts'
import { finite, flag, pictureSize, positiveInteger } from './fields.ts'
import { makePixels, pixelTensor, readNormaliser, type Normaliser, type PixelArray } from './normaliser.ts'
import { sequentialPositions } from './positions.ts'
import { openPicture } from './picture.ts'
import { expandContiguous, readImageToken } from './prompt.ts'

/**
 * InternVL: a picture is stretched to the grid of square tiles nearest to its aspect ratio, a thumbnail of the whole is
 * added when there is more than one tile, and every tile becomes the same number of tokens.
 */

const PREPROCESSOR = 'preprocessor_config.json'
/** A request may ask for more tiles than the model's default, but not without end. */
const MAX_TILES = 64
const IMAGENET_MEAN = [0.485, 0.456, 0.406] as const
const IMAGENET_STD = [0.229, 0.224, 0.225] as const

export interface TileGrid {
  readonly columns: number
  readonly rows: number
}

interface TilePlan {
  readonly tile: PictureSize
  readonly tokensPerTile: number
  readonly minTiles: number
  readonly maxTiles: number
  readonly thumbnail: boolean
  readonly normaliser: Normaliser
  readonly inputName: string
}

/**
 * The grid of `min` to `max` tiles whose aspect ratio is nearest to the picture's. Of equally near ones the larger is
 * taken when the picture fills more than half of it.
 */
export function closestGrid (size: PictureSize, tile: PictureSize, min: number, max: number): TileGrid {
  const aspect = size.width / size.height
  const area = size.width * size.height
  const grids: TileGrid[] = []
  for (let columns = 1; columns <= max; columns++) {
    for (let rows = 1; rows <= max; rows++) if (columns * rows >= min && columns * rows <= max) grids.push({ columns, rows })
  }
  grids.sort((a, b) => a.columns * a.rows - b.columns * b.rows)
  let best: TileGrid = { columns: 1, rows: 1 }
  let bestDifference = Infinity
  for (const grid of grids) {
    const difference = Math.abs(aspect - grid.columns / grid.rows)
    if (difference < bestDifference) {
      bestDifference = difference
      best = grid
    } else if (difference === bestDifference && area > 0.5 * tile.width * tile.height * grid.columns * grid.rows) {
      best = grid
    }
  }
  return best
}

/** Tokens of one tile: stated, or the graph's own, or patches after pixel shuffle. */
function tokensPerTile (source: ModelSource, tile: PictureSize): number {
  const { config, preprocessor, vision } = source
  const stated = preprocessor.image_seq_length ?? config.image_seq_length
  const inGraph = vision?.outputs[0]?.shape.at(-2)
  if (typeof stated === 'number') {
    if (typeof inGraph === 'number' && inGraph !== stated) {
      throw new ModelError(`onnx/vision_encoder.onnx gives ${inGraph} tokens a tile, the configuration says ${stated}`)
    }
    return positiveInteger({ image_seq_length: stated }, 'image_seq_length', PREPROCESSOR)
  }
  if (typeof inGraph === 'number') return inGraph
  const patch = pictureSize((config.vision_config as { patch_size?: unknown } | undefined)?.patch_size)?.width ?? 14
  return Math.round((tile.width / patch) * (tile.height / patch) * finite(config, 'downsample_ratio', 'config.json', 0.5) ** 2)
}

function readPlan (source: ModelSource): TilePlan {
  const { config, preprocessor, vision } = source
  const tile = pictureSize(preprocessor.size ?? preprocessor.crop_size ?? (config.vision_config as { image_size?: unknown } | undefined)?.image_size)
  if (tile === undefined) throw new ModelError(`${PREPROCESSOR}: "size" must give the height and width of a tile`)
  const inputName = vision?.inputs[0]?.name ?? 'pixel_values'
  // `crop_to_patches` is not read: published folders say false there, and InternVL's processor overrides it for pictures.
  return {
    tile,
    tokensPerTile: tokensPerTile(source, tile),
    minTiles: positiveInteger(preprocessor, 'min_patches', PREPROCESSOR, positiveInteger(config, 'min_dynamic_patch', 'config.json', 1)),
    maxTiles: positiveInteger(preprocessor, 'max_patches', PREPROCESSOR, positiveInteger(config, 'max_dynamic_patch', 'config.json', 12)),
    thumbnail: flag(preprocessor, 'use_thumbnail', flag(config, 'use_thumbnail', true)),
    normaliser: readNormaliser(source, inputName, IMAGENET_MEAN, IMAGENET_STD),
    inputName
  }
}

function countTiles (plan: TilePlan, columns: number, rows: number): number {
  return columns * rows + (plan.thumbnail && columns * rows > 1 ? 1 : 0)
}

function shapeOf (plan: TilePlan, size: PictureSize, settings: PixelSettings): ItemShape & { grid: readonly [number, number], tiles: number } {
  const max = Math.min(settings.max_dynamic_patch ?? plan.maxTiles, MAX_TILES)
  const { columns, rows } = closestGrid(size, plan.tile, Math.min(plan.minTiles, max), max)
  const tiles = countTiles(plan, columns, rows)
  return { grid: [columns, rows], tiles, numTokens: tiles * plan.tokensPerTile }
}

async function prepare (plan: TilePlan, bytes: Uint8Array, settings: PixelSettings, signal?: AbortSignal): Promise<PreparedItem> {
  const picture = await openPicture(bytes)
  signal?.throwIfAborted()
  const { grid, tiles, numTokens } = shapeOf(plan, picture.size, settings)
  const [columns, rows] = grid
  const { tile, normaliser } = plan
  const wholes = [picture.resize({ width: columns * tile.width, height: rows * tile.height })]
  if (tiles > columns * rows) wholes.push(picture.resize(tile))
  const [canvas, thumbnail] = await Promise.all(wholes)
  signal?.throwIfAborted()
  const dims = [tiles, 3, tile.height, tile.width]
  const pixels = makePixels(normaliser, tiles * 3 * tile.height * tile.width)
  const end = writeTiles(canvas as Uint8Array, { columns, rows }, tile, normaliser, pixels, 0)
  if (thumbnail !== undefined) writeTiles(thumbnail, { columns: 1, rows: 1 }, tile, normaliser, pixels, end)
  return { grid, numTokens, units: tiles, inputs: [{ name: plan.inputName, batchAxis: 0, tensor: pixelTensor(pixels, dims) }] }
}

function open (source: ModelSource): FamilyModel {
  const plan = readPlan(source)
  const { imageTokenId, imageToken } = readImageToken(source, source.config.image_token_id ?? source.config.img_context_token_id ?? source.specialTokens['<IMG_CONTEXT>'])
  const markers = { start: source.specialTokens['<img>'], end: source.specialTokens['</img>'] }
  return {
    imageTokenId,
    imageToken,
    maxTokensPerItem: (plan.maxTiles + (plan.thumbnail && plan.maxTiles > 1 ? 1 : 0)) * plan.tokensPerTile,
    tokensFor: (size, settings = {}) => {
      const { grid, numTokens } = shapeOf(plan, size, settings)
      return { grid, numTokens }
    },
    fits: ({ grid, numTokens }) => {
      const [columns = 0, rows = 0] = grid
      return grid.length === 2 && columns >= 1 && rows >= 1 && numTokens === countTiles(plan, columns, rows) * plan.tokensPerTile
    },
    prepare: (bytes, settings, signal) => prepare(plan, bytes, settings, signal),
    layoutPrompt: (ids, items) => expandContiguous(ids, items, imageTokenId, markers),
    positions: ids => sequentialPositions(ids.length)
  }
}

export const internvl: ModelFamily = { name: 'internvl', modelTypes: ['internvl', 'internvl_chat'], open }

/** Cutting a resized picture into tiles. */

/**
 * Writes the tiles of `rgb`, a picture of `grid` tiles, row by row into `out` from element `offset`: each as three
 * planes (CHW). Returns the element after the last.
 */
export function writeTiles (rgb: Uint8Array, grid: { columns: number, rows: number }, tile: PictureSize, normaliser: Normaliser, out: PixelArray, offset: number): number {
  const { width, height } = tile
  const stride = grid.columns * width * 3
  let at = offset
  for (let row = 0; row < grid.rows; row++) {
    for (let column = 0; column < grid.columns; column++) {
      for (let channel = 0; channel < 3; channel++) {
        const table = normaliser.tables[channel] as Float32Array
        for (let y = 0; y < height; y++) {
          let from = (row * height + y) * stride + column * width * 3 + channel
          for (let x = 0; x < width; x++, from += 3) out[at++] = table[rgb[from] as number] as number
        }
      }
    }
  }
  return at
}
