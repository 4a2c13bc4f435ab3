import { cpSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { deflateSync } from 'node:zlib'
import sharp, { type Sharp } from 'sharp'
import t, { type Test } from 'tap'
import {
  ModelError, PictureError, PlaceholderError, featureBlockShape, featureBlocksFor, loadModel, readGraphSignature, sniffPicture, type LoadedModel, type PreparedItem
} from '../../engines/models/index.ts'
import { closestGrid } from '../../engines/models/internvl.ts'
import { fromFloat16 } from '../../engines/runtime/index.ts'
import { fakeModel, TILE } from '../helper/fake-model.ts'
import { pngHeader } from '../helper/png.ts'

const MEAN = [0.485, 0.456, 0.406] as const
const STD = [0.229, 0.224, 0.225] as const

async function openModel (t: Test, options: Parameters<typeof fakeModel>[1] = {}): Promise<LoadedModel> {
  return await loadModel(fakeModel(t.testdir(), options), { vision: true, decoder: false })
}

/** A picture of one colour. */
function plain (width: number, height: number, colour: { r: number, g: number, b: number, alpha?: number }): Sharp {
  return sharp({ create: { width, height, channels: colour.alpha === undefined ? 3 : 4, background: colour } })
}

/** The colour (0-255) of a pixel of a tile, denormalised. */
function pixel (item: PreparedItem, tile: number, x: number, y: number): number[] {
  const { data } = item.inputs[0]?.tensor as { data: Float32Array }
  return [0, 1, 2].map(c => Math.round(((data[((tile * 3 + c) * TILE + y) * TILE + x] as number) * (STD[c] as number) + (MEAN[c] as number)) * 255))
}

function near (t: Test, found: number[], wanted: number[], tolerance = 3): void {
  t.ok(found.every((v, i) => Math.abs(v - (wanted[i] as number)) <= tolerance), `${found.join(',')} is near ${wanted.join(',')}`)
}

t.test('the grid nearest to the aspect ratio is taken, and of equals the larger one for large pictures', async t => {
  const tile = { width: 100, height: 100 }
  const grid = (width: number, height: number, max = 4): number[] => {
    const { columns, rows } = closestGrid({ width, height }, tile, 1, max)
    return [columns, rows]
  }
  t.same(grid(90, 90), [1, 1], 'a small square is one tile')
  t.same(grid(150, 150), [2, 2], 'a square of more than half of four tiles is four')
  t.same(grid(141, 141), [1, 1], 'and one of less is one')
  t.same(grid(300, 100), [3, 1])
  t.same(grid(100, 1000), [1, 4])
  t.same(grid(3000, 2000, 12), [3, 2])
  t.same(grid(1600, 900, 12), [4, 2], 'nearest to 1.78 with up to 12 tiles')
})

t.test('a picture becomes tiles row by row with a thumbnail behind them', async t => {
  const model = await openModel(t)
  // Left half red, right half blue: two tiles.
  const blue = await plain(TILE * 4, TILE * 4, { r: 0, g: 0, b: 255 }).png().toBuffer()
  const bytes = await plain(TILE * 8, TILE * 4, { r: 255, g: 0, b: 0 }).composite([{ input: blue, left: TILE * 4, top: 0 }]).png().toBuffer()
  const item = await model.prepare(bytes, {})
  t.same([item.grid, item.numTokens, item.units], [[2, 1], 12, 3])
  t.match(item.inputs, [{ name: 'pixel_values', batchAxis: 0, tensor: { type: 'float32', dims: [3, 3, TILE, TILE] } }])
  near(t, pixel(item, 0, 3, 3), [255, 0, 0])
  near(t, pixel(item, 1, TILE - 1, TILE - 1), [0, 0, 255])
  near(t, pixel(item, 2, 0, 5), [255, 0, 0])
  near(t, pixel(item, 2, TILE - 1, 5), [0, 0, 255])
  t.same(model.tokensFor({ width: TILE * 8, height: TILE * 4 }), { grid: [2, 1], numTokens: 12 })
  t.ok(model.fits(item))
  t.notOk(model.fits({ grid: [2, 1], numTokens: 8 }))
  t.notOk(model.fits({ grid: [3], numTokens: 12 }))
})

t.test('max_dynamic_patch limits the tiles of one item', async t => {
  const model = await openModel(t)
  const bytes = await plain(TILE * 8, TILE * 4, { r: 1, g: 2, b: 3 }).png().toBuffer()
  const item = await model.prepare(bytes, { max_dynamic_patch: 1 })
  t.same([item.grid, item.numTokens, item.units], [[1, 1], 4, 1], 'one tile has no thumbnail')
})

t.test('values are normalised as single-precision preprocessors do it', async t => {
  const model = await openModel(t)
  const bytes = await plain(TILE, TILE, { r: 10, g: 128, b: 250 }).png().toBuffer()
  const { data } = (await model.prepare(bytes, {})).inputs[0]?.tensor as { data: Float32Array }
  const f = Math.fround
  for (const [channel, value] of [10, 128, 250].entries()) {
    const wanted = f(f(f(value * (1 / 255)) - f(MEAN[channel] as number)) / f(STD[channel] as number))
    t.equal(data[channel * TILE * TILE + 17], wanted)
  }
})

t.test('a graph with float16 pixels gets them', async t => {
  const model = await openModel(t, { type: 'float16' })
  t.equal(model.dtype, 'float16')
  t.equal(featureBlockShape(model).blockBytes, 32 * 8 * 2)
  const item = await model.prepare(await plain(TILE, TILE, { r: 255, g: 0, b: 0 }).png().toBuffer(), {})
  const { tensor } = item.inputs[0] as PreparedItem['inputs'][number]
  t.equal(tensor.type, 'float16')
  t.ok(Math.abs(fromFloat16((tensor.data as Uint16Array)[0] as number) - (1 - MEAN[0]) / STD[0]) < 2e-3)
})

t.test('orientation, transparency, colour spaces, depth and animation', async t => {
  const model = await openModel(t)
  const red = { r: 255, g: 0, b: 0 }
  const blueCorner = await plain(TILE, TILE, { r: 0, g: 0, b: 255 }).png().toBuffer()
  const upright = await plain(TILE, TILE * 3, red).composite([{ input: blueCorner, left: 0, top: 0 }]).png().toBuffer()
  const turned = await sharp(upright).rotate(90).withMetadata({ orientation: 8 }).jpeg({ quality: 100, chromaSubsampling: '4:4:4' }).toBuffer()
  const item = await model.prepare(turned, {})
  t.same(item.grid, [1, 3], 'EXIF orientation decides the grid')
  near(t, pixel(item, 0, 8, 8), [0, 0, 255], 6)
  near(t, pixel(item, 2, 8, 8), [255, 0, 0], 6)

  const clear = await model.prepare(await plain(TILE, TILE, { r: 255, g: 0, b: 0, alpha: 0 }).png().toBuffer(), {})
  near(t, pixel(clear, 0, 5, 5), [255, 255, 255])
  const half = await model.prepare(await plain(TILE, TILE, { r: 255, g: 0, b: 0, alpha: 0.5 }).webp({ lossless: true }).toBuffer(), {})
  near(t, pixel(half, 0, 5, 5), [255, 127, 127])

  const grey = await model.prepare(await plain(TILE, TILE, { r: 100, g: 100, b: 100 }).toColourspace('b-w').png().toBuffer(), {})
  near(t, pixel(grey, 0, 5, 5), [100, 100, 100])
  const deep = await model.prepare(await plain(TILE, TILE, { r: 200, g: 100, b: 50 }).toColourspace('rgb16').png().toBuffer(), {})
  near(t, pixel(deep, 0, 5, 5), [200, 100, 50])
  const deepGrey = await model.prepare(await plain(TILE, TILE, { r: 90, g: 90, b: 90 }).toColourspace('grey16').png().toBuffer(), {})
  near(t, pixel(deepGrey, 0, 5, 5), [90, 90, 90])
  const cmyk = await model.prepare(await plain(TILE, TILE, { r: 255, g: 255, b: 255 }).toColourspace('cmyk').jpeg().toBuffer(), {})
  near(t, pixel(cmyk, 0, 5, 5), [255, 255, 255], 8)
  const palette = await model.prepare(await plain(TILE, TILE, { r: 0, g: 255, b: 0 }).png({ palette: true }).toBuffer(), {})
  near(t, pixel(palette, 0, 5, 5), [0, 255, 0])

  const frames = await Promise.all([red, { r: 0, g: 255, b: 0 }].map(c => plain(TILE, TILE, c).png().toBuffer()))
  const animated = await sharp(frames, { join: { animated: true } }).gif().toBuffer()
  const first = await model.prepare(animated, {})
  t.same(first.grid, [1, 1], 'an animation is its first frame')
  near(t, pixel(first, 0, 5, 5), [255, 0, 0], 6)
})

t.test('what is no usable picture is a PictureError that says why', async t => {
  const model = await openModel(t)
  const png = await plain(64, 64, { r: 1, g: 2, b: 3 }).png().toBuffer()
  const noise = Buffer.from(Array.from({ length: 30_000 }, (_, i) => (i * 7919) % 251))
  const jpeg = await sharp(noise, { raw: { width: 100, height: 100, channels: 3 } }).jpeg().toBuffer()
  const rejects = async (bytes: Uint8Array, message: RegExp): Promise<void> => { await t.rejects(model.prepare(bytes, {}), { name: 'PictureError', message }) }
  await rejects(Buffer.from('hello'), /no picture of a supported format/)
  await rejects(Buffer.from('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'), /no picture of a supported format/)
  await rejects(png.subarray(0, png.length - 30), /can't be decoded/)
  await rejects(jpeg.subarray(0, jpeg.length >> 1), /can't be decoded/)
  await rejects(Buffer.concat([png.subarray(0, 60), Buffer.alloc(200, 7)]), /can't be decoded/)
  await rejects(png.subarray(0, 12), /can't be decoded/)
  await rejects(await plain(2000, 2, { r: 0, g: 0, b: 0 }).png().toBuffer(), /too narrow: 2000x2/)
  const before = process.memoryUsage().rss
  const start = performance.now()
  await rejects(pngHeader(50_000, 50_000), /too large: 50000x50000 pixels/)
  await rejects(pngHeader(50_000, 50_000, deflateSync(Buffer.alloc(1_000_000))), /too large: 50000x50000 pixels/)
  t.ok(performance.now() - start < 1_000, 'a bomb is refused by its header')
  t.ok(process.memoryUsage().rss - before < 100e6, 'without its memory')
  await t.rejects(model.prepare(png, {}, AbortSignal.abort(new Error('gone'))), { message: 'gone' })
  t.ok(new PictureError('x') instanceof Error)
})

t.test('formats are recognised by their first bytes', async t => {
  const picture = plain(8, 8, { r: 9, g: 9, b: 9 })
  for (const format of ['jpeg', 'png', 'webp', 'gif', 'tiff', 'avif'] as const) t.equal(sniffPicture(await picture.clone().toFormat(format).toBuffer()), `image/${format}`)
  t.equal(sniffPicture(Buffer.from('Qk1GAAAAAAAAADYAAAAoAAAAAgAAAAIAAAAB', 'base64')), 'image/bmp')
  for (const bytes of [Buffer.alloc(0), Buffer.from('%PDF-1.7 and so on'), Buffer.from('BM123456789012'), Buffer.from('RIFF1234WAVE')]) t.equal(sniffPicture(bytes), undefined)
})

t.test('each placeholder of a prompt becomes the item\'s tokens between markers', async t => {
  const model = await openModel(t)
  const { imageTokenId: image, source: { specialTokens } } = model
  const [start, end] = [specialTokens['<img>'], specialTokens['</img>']] as [number, number]
  const items = [{ grid: [1, 1], numTokens: 4 }, { grid: [2, 1], numTokens: 12 }]
  const { ids, mediaSpans } = model.layoutPrompt([7, image, 8, start, image, end, 9], items)
  t.same(ids, [7, start, ...Array(4).fill(image), end, 8, start, ...Array(12).fill(image), end, 9], 'markers the template has put there are not doubled')
  t.same(mediaSpans, [{ item: 0, start: 2, length: 4, offset: 0 }, { item: 1, start: 9, length: 12, offset: 0 }])
  const positions = model.positions(ids, mediaSpans, items)
  t.same([positions.axes, [...positions.values], positions.next], [1, ids.map((_, i) => i), ids.length])
  t.throws(() => model.layoutPrompt([7, image], []), PlaceholderError)
  t.throws(() => model.layoutPrompt([7], items), /places for 0 media items, 2 were given/)
  t.equal(model.imageToken, '<IMG_CONTEXT>')
})

t.test('a model folder is read without its decoder, and by name when something is missing', async t => {
  const dir = fakeModel(t.testdir())
  const model = await loadModel(dir, { vision: true, decoder: false, name: 'mine' })
  t.match(model, { name: 'mine', family: 'internvl', hiddenSize: 8, dtype: 'float32', files: { embed: undefined, decoder: undefined }, text: { layers: 2, kvHeads: 1, headDim: 4, vocab: 64, eosIds: [1] } })
  t.match(model.fingerprint, /^[0-9a-f]{64}$/)
  t.equal(model.maxTokensPerItem, 20)
  t.equal(featureBlocksFor(33), 2)
  const text = await loadModel(dir, { vision: false, decoder: false })
  t.same([text.visionIdentity, text.fingerprint], [undefined, model.fingerprint])
  await t.rejects(loadModel(dir, { vision: true, decoder: true }), /onnx\/embed_tokens\.onnx is missing in the model folder/)
  await t.rejects(loadModel(dir, { vision: true, decoder: false, variant: 'fp16' }), /vision_encoder_fp16\.onnx is missing/)
  for (const file of ['config.json', 'preprocessor_config.json', 'tokenizer.json']) {
    const copy = join(t.testdirName, '..', `${file}-copy`)
    t.teardown(() => { rmSync(copy, { recursive: true, force: true }) })
    cpSync(dir, copy, { recursive: true })
    rmSync(join(copy, file))
    await t.rejects(loadModel(copy, { vision: true, decoder: false }), { name: 'ModelError', message: new RegExp(`^${file} is missing`) })
    writeFileSync(join(copy, file), '{ not json')
    await t.rejects(loadModel(copy, { vision: true, decoder: false }), { message: new RegExp(`^${file} is not valid JSON`) })
  }
})

t.test('a configuration that can\'t be right is refused by file and field', async t => {
  const cases: Array<[string, (json: Record<string, unknown>) => void, RegExp]> = [
    ['config.json', c => { c.model_type = 'llava' }, /model_type "llava" is none of those engines know \(internvl, internvl_chat, qwen2_vl\)/],
    ['config.json', c => { c.text_config = 3 }, /config\.json: "text_config" must be an object/],
    ['config.json', c => { (c.text_config as Record<string, unknown>).vocab_size = 0 }, /"vocab_size" must be a positive integer/],
    ['config.json', c => { c.image_token_id = 63 }, /no added token has the id 63/],
    ['preprocessor_config.json', c => { c.image_mean = [1] }, /"image_mean" must be three numbers/],
    ['preprocessor_config.json', c => { c.rescale_factor = 'x' }, /"rescale_factor" must be a number/],
    ['preprocessor_config.json', c => { c.image_seq_length = 5 }, /gives 4 tokens a tile, the configuration says 5/],
    ['preprocessor_config.json', c => { c.size = 'big' }, /"size" must give the height and width/]
  ]
  for (const [file, change, message] of cases) {
    const dir = fakeModel(t.testdir())
    const json = JSON.parse(readFileSync(join(dir, file), 'utf8')) as Record<string, unknown>
    change(json)
    writeFileSync(join(dir, file), JSON.stringify(json))
    await t.rejects(loadModel(dir, { vision: true, decoder: false }), { name: 'ModelError', message })
  }
})

t.test('inputs and outputs are read from a graph without loading it', async t => {
  const dir = fakeModel(t.testdir())
  const signature = await readGraphSignature(join(dir, 'onnx', 'vision_encoder.onnx'))
  t.same(signature, {
    inputs: [{ name: 'pixel_values', type: 'float32', shape: ['tiles', 3, TILE, TILE] }], outputs: [{ name: 'image_features', type: 'float32', shape: ['tiles', 4, 8] }]
  })
  for (const [name, bytes] of Object.entries({ empty: '', text: 'what is this', cut: readFileSync(join(dir, 'onnx', 'vision_encoder.onnx')).subarray(0, 100) })) {
    writeFileSync(join(dir, name), bytes)
    await t.rejects(readGraphSignature(join(dir, name)), ModelError)
  }
})
