import { cpSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import sharp from 'sharp'
import t from 'tap'
import { loadModel, PictureError, PlaceholderError, type LoadedModel } from '../../engines/models/index.ts'
import { mostPixels, smartResize } from '../../engines/models/qwen2-vl-picture.ts'
import { loadTokenizer } from '../../engines/llm/text/tokenizer.ts'
import { ChatTemplate } from '../../engines/llm/text/chat-template.ts'
import { chatBody, pictureBytes, qwenModelDir, reference, tokensOf } from '../helper/qwen2-vl.ts'

const FACTOR = 28
/** Of a standard deviation: where nothing is resized, only rounding differs. */
const SAME = 1e-5
/** One of 256 levels is at most this much of a standard deviation. */
const LEVEL = 1 / 255 / 0.26

const model = await loadModel(qwenModelDir, { vision: true, decoder: true })

t.test('sizes are those of transformers\' smart_resize, also where Python rounds to even', async t => {
  for (const [width, height, min, max, resizedWidth, resizedHeight] of reference.sizes) {
    const resized = smartResize({ width, height }, FACTOR, { min, max })
    t.same(resized, { width: resizedWidth, height: resizedHeight }, `${width}x${height} within ${min} to ${max}`)
    t.ok(resized.width * resized.height <= mostPixels(FACTOR, { min, max }), 'and never more than the most')
    if (max !== 28 * 28 * 64) continue
    t.same(model.tokensFor({ width, height }).grid, [1, resizedHeight / 14, resizedWidth / 14], 'which are the model\'s own within its own budget')
    for (const settings of [{ max_pixels: 1 }, { min_pixels: 999_999 }, { max_pixels: 999_999 }, { resized_width: 41, resized_height: 8200 }]) {
      t.ok(model.tokensFor({ width, height }, settings).numTokens <= model.maxTokensPerItem, `${JSON.stringify(settings)} makes nothing too large of it`)
    }
  }
})

t.test('pictures become the patches of transformers\' image processor', async t => {
  for (const [name, wanted] of Object.entries(reference.pictures)) {
    const item = await model.prepare(pictureBytes(name), {})
    t.same(item.grid, wanted.grid, `${name}: grid`)
    const numTokens = tokensOf(wanted.grid)
    t.equal(item.numTokens, numTokens)
    t.same(model.tokensFor(wanted), { grid: wanted.grid, numTokens }, 'as it is said from its size alone')
    t.ok(model.fits(item) && numTokens <= model.maxTokensPerItem)
    const [pixels, grid] = item.inputs
    t.match(grid, { name: 'grid_thw', tensor: { type: 'int64', dims: [1, 3], data: BigInt64Array.from(wanted.grid, BigInt) } })
    t.match(pixels, { name: 'pixel_values', tensor: { type: 'float32', dims: wanted.shape } })
    const data = pixels?.tensor.data as Float32Array
    const differences = wanted.sample.map((value, i) => Math.abs(value - (data[i * wanted.stride] as number)))
    const [most, mean] = [Math.max(...differences), differences.reduce((sum, d) => sum + d, 0) / differences.length]
    t.equal(wanted.sample.length, Math.ceil(data.length / wanted.stride), 'the sample covers the picture')
    // Other libraries resize: single pixels at sharp edges are a few of 256 levels off, hardly any of the others is.
    t.ok(most < (wanted.resized ? 8 * LEVEL : SAME), `${name}: at most ${most} off`)
    t.ok(mean < (wanted.resized ? 0.2 * LEVEL : SAME), `${name}: ${mean} off in the mean`)
    t.ok(Math.abs(data.reduce((sum, value) => sum + value, 0) / data.length - wanted.mean) < 1e-3, 'the mean over everything')
  }
})

t.test('prompts are laid out as transformers\' processor does, with the positions of get_rope_index', async t => {
  const { tokenizer, config } = await loadTokenizer(qwenModelDir)
  const template = await ChatTemplate.load(qwenModelDir, config, tokenizer.specialText)
  for (const [name, prompt] of Object.entries(reference.prompts)) {
    const messages = chatBody(prompt).messages as Parameters<ChatTemplate['render']>[0]
    const items = prompt.grids.map(grid => ({ grid, numTokens: tokensOf(grid) }))
    const { ids, mediaSpans } = model.layoutPrompt(tokenizer.encode(template.render(messages)), items)
    t.same(ids, prompt.ids, `${name}: tokens`)
    t.same(mediaSpans.map(({ length }) => length), items.map(({ numTokens }) => numTokens))
    const { axes, values, next } = model.positions(ids, mediaSpans, items)
    t.same([axes, next], [3, prompt.next], `${name}: the first answered token's position`)
    t.same([0, 1, 2].map(axis => [...values.subarray(axis * ids.length, (axis + 1) * ids.length)]), prompt.positions, `${name}: positions`)
    if (items.length > 0) t.throws(() => model.layoutPrompt(tokenizer.encode(template.render(messages)), items.slice(1)), PlaceholderError)
  }
  // Without a template nothing has put the markers there.
  const bare = model.layoutPrompt([5, model.imageTokenId, 6], [{ grid: [1, 2, 2], numTokens: 1 }])
  t.same(bare.ids.map(id => Buffer.from(tokenizer.bytes(id)).toString()).slice(1, -1), ['<|vision_start|>', '<|image_pad|>', '<|vision_end|>'])
})

t.test('a request may choose the size of a picture within what the model allows', async t => {
  const bytes = await sharp({ create: { width: 200, height: 150, channels: 3, background: { r: 9, g: 99, b: 199 } } }).png().toBuffer()
  const grid = async (settings: Parameters<LoadedModel['prepare']>[1]): Promise<readonly number[]> => {
    const item = await model.prepare(bytes, settings)
    t.same(model.tokensFor({ width: 200, height: 150 }, settings), { grid: item.grid, numTokens: item.numTokens })
    return item.grid
  }
  t.same(await grid({}), [1, 10, 14])
  t.same(await grid({ max_pixels: 28 * 28 * 12 }), [1, 6, 8], 'smaller')
  t.same(await grid({ min_pixels: 28 * 28 * 40 }), [1, 12, 16], 'larger')
  t.same(await grid({ resized_width: 90, resized_height: 170 }), [1, 12, 6], 'another shape')
  t.same(await grid({ resized_width: 90 }), [1, 10, 14], 'one side alone says nothing, as in LMDeploy')
  t.same(await grid({ min_pixels: 28 * 28 * 5000, max_pixels: 28 * 28 * 9000 }), [1, 12, 18], 'never more than the model takes')
  t.same(await grid({ max_pixels: 1 }), [1, 4, 4], 'never less')
  await t.rejects(model.prepare(bytes, { resized_width: 1, resized_height: 900 }), PictureError)
  await t.rejects(model.prepare(Buffer.from('no picture'), {}), PictureError)
})

t.test('grids that can be no picture of this model are refused', async t => {
  t.ok(model.fits({ grid: [1, 4, 6], numTokens: 6 }))
  for (const [grid, numTokens] of [[[1, 4, 6], 5], [[4, 6], 6], [[2, 4, 6], 12], [[1, 3, 8], 6], [[1, 0, 8], 0], [[1, 2.5, 8], 5], [[], 1]] as const) t.notOk(model.fits({ grid, numTokens }), `${grid.join()} is not ${numTokens}`)
})

t.test('the folder is read by what its files say, and what can\'t be right is refused by file and field', async t => {
  t.match(model, { family: 'qwen2-vl', name: 'qwen2-vl-random', hiddenSize: 64, dtype: 'float32', imageToken: '<|image_pad|>', text: { layers: 3, kvHeads: 2, headDim: 16, vocab: 379, maxPositions: 2048, eosIds: [373, 371] } })
  const changed = async (file: string, change: (json: Record<string, unknown>) => void): Promise<LoadedModel> => {
    const dir = t.testdir()
    cpSync(qwenModelDir, dir, { recursive: true })
    const json = JSON.parse(readFileSync(join(dir, file), 'utf8')) as Record<string, unknown>
    change(json)
    writeFileSync(join(dir, file), JSON.stringify(json))
    return await loadModel(dir, { vision: true, decoder: true })
  }
  // As published folders of this family have it: text settings at the top of config.json, the budget as min_pixels and max_pixels.
  const older = await changed('config.json', json => {
    Object.assign(json, { ...(json.text_config as object), model_type: 'qwen2_vl' })
    delete json.text_config
  })
  t.same(older.text, model.text)
  const budget = await changed('preprocessor_config.json', json => {
    delete json.size
    Object.assign(json, { min_pixels: 3136, max_pixels: 28 * 28 * 16 })
  })
  t.same(budget.tokensFor({ width: 420, height: 300 }), { grid: [1, 6, 8], numTokens: 12 })
  const cases: Array<[string, (json: Record<string, unknown>) => void, RegExp]> = [
    ['config.json', json => { json.image_token_id = 5 }, /no added token has the id 5/],
    ['preprocessor_config.json', json => { json.patch_size = 0 }, /"patch_size" must be a positive integer/],
    ['preprocessor_config.json', json => { json.merge_size = '2' }, /"merge_size" must be a positive integer/],
    ['preprocessor_config.json', json => { json.max_pixels = 100 }, /"min_pixels" \(3136\) must not be larger than "max_pixels" \(100\)/],
    ['preprocessor_config.json', json => { json.image_std = [1, 2] }, /"image_std" must be three numbers/]
  ]
  for (const [file, change, message] of cases) await t.rejects(changed(file, change), { name: 'ModelError', message })
  const dir = t.testdir()
  cpSync(qwenModelDir, dir, { recursive: true })
  cpSync(join(dir, 'onnx', 'embed_tokens.onnx'), join(dir, 'onnx', 'vision_encoder.onnx'))
  await t.rejects(loadModel(dir, { vision: true, decoder: false }), { name: 'ModelError', message: /must take pixel values and, as int64, the grid/ })
})
