import { readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import t from 'tap'
import { changeOne, countOf, describeScene, makeScene, pick, questionsFor, renderScene, seededRandom, type Question, type Scene, type Thing } from '../helper/pictures.ts'
import { openTinyModel, tinyModelDir, userMessage, type Past } from '../helper/tiny-model.ts'
import { measure, rate } from './accuracy.ts'

/** More pictures on request: `EPD_TEST_FULL=1`. */
const FULL = process.env.EPD_TEST_FULL === '1'
const SAMPLE = FULL ? 1000 : 6
const SWAPS = FULL ? 10 : 4
const PAIRS = FULL ? 100 : 6

t.setTimeout(FULL ? 1_200_000 : 120_000)
const tiny = await openTinyModel()
t.teardown(async () => { await tiny.close() })

await t.test('the folder has the layout of a published model and weighs at most 20 MB', async t => {
  const files = [
    'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'preprocessor_config.json',
    'onnx/vision_encoder.onnx', 'onnx/embed_tokens.onnx', 'onnx/decoder_model_merged.onnx'
  ]
  for (const file of files) t.ok((await stat(join(tinyModelDir, file))).isFile(), file)
  let bytes = 0
  for (const entry of await readdir(tinyModelDir, { recursive: true, withFileTypes: true })) {
    if (entry.isFile() && !entry.parentPath.includes('__pycache__')) bytes += (await stat(join(entry.parentPath, entry.name))).size
  }
  t.ok(bytes <= 20e6, `${bytes} bytes`)
  t.equal(tiny.model.family, 'internvl')
  t.equal(tiny.model.text.kvHeads < 8, true, 'grouped-query attention')
})

await t.test('the tokenizer gives any text back', async t => {
  const texts = ['How many red circles are there?', 'Größe: 3 °C', '日本語のテキスト', '🎉👩‍👩‍👧 e\u0301 \u00e9', ' two  spaces\n\n\ttab ', '\u0000\u001f', 'I\'ll DON\'T we\'ve', '1234567890']
  for (const text of texts) t.equal(tiny.tokenizer.decode(tiny.tokenizer.encode(text, { add_special_tokens: false }).ids), text, JSON.stringify(text))
})

await t.test('the chat template renders ChatML, pictures where they stand', async t => {
  const render = (messages: unknown) => tiny.template.render({ messages, add_generation_prompt: true })
  t.equal(
    render([{ role: 'system', content: 'Be short.' }, userMessage('How many?', 2), { role: 'assistant', content: '3' }, userMessage('And stars?', 1, true)]),
    '<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nHow many?<|im_end|>\n' +
    '<|im_start|>assistant\n3<|im_end|>\n<|im_start|>user\nAnd stars?<IMG_CONTEXT>\n<|im_end|>\n<|im_start|>assistant\n'
  )
  const config = JSON.parse(await readFile(join(tinyModelDir, 'tokenizer_config.json'), 'utf8')) as { eos_token: string }
  t.equal(config.eos_token, '<|im_end|>')
})

await t.test('decoding with past equals decoding without, padded or not', async t => {
  const random = seededRandom(3)
  const seen = await tiny.see(await renderScene(makeScene(random)))
  const { x, length } = await tiny.promptEmbeddings([userMessage('Describe the picture.', 1)], [seen])
  const width = tiny.model.hiddenSize
  const range = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i)
  const ones = (n: number) => Array<number>(n).fill(1)
  const all = (await tiny.decode(x, 1, ones(length), range(0, length))).logits.data as Float32Array
  const vocab = all.length / length
  const distance = (a: Float32Array, b: Float32Array) => a.reduce((worst, v, i) => Math.max(worst, Math.abs(v - (b[i] as number))), 0)

  const cut = length - 12
  const first = await tiny.decode(x.slice(0, cut * width), 1, ones(cut), range(0, cut))
  let past: Past = first.present
  // The same past behind five padded places full of rubbish, which attention_mask hides.
  const pad = 5
  let padded: Past = past.map(tensor => {
    const [, heads, , dim] = tensor.dims as [number, number, number, number]
    const data = new Float32Array(heads * (pad + cut) * dim).fill(7)
    for (let h = 0; h < heads; h++) data.set((tensor.data as Float32Array).subarray(h * cut * dim, (h + 1) * cut * dim), (h * (pad + cut) + pad) * dim)
    return new (tensor.constructor as typeof import('onnxruntime-node').Tensor)('float32', data, [1, heads, pad + cut, dim])
  })
  for (let at = cut; at < length; at++) {
    const token = x.slice(at * width, (at + 1) * width)
    const step = await tiny.decode(token, 1, ones(at + 1), [at], past)
    const expected = all.subarray(at * vocab, (at + 1) * vocab)
    t.ok(distance(expected, step.logits.data as Float32Array) < 1e-3, `step ${at}`)
    const hidden = await tiny.decode(token, 1, [...Array<number>(pad).fill(0), ...ones(at + 1)], [at], padded)
    t.ok(distance(expected, hidden.logits.data as Float32Array) < 1e-3, `step ${at}, padded`)
    const delta = step.delta[0]?.data as Float32Array
    const present = step.present[0]
    const dim = present?.dims[3] as number
    t.same(delta.subarray(0, dim), (present?.data as Float32Array).subarray(at * dim, (at + 1) * dim), 'delta is what the step added')
    past = step.present
    padded = hidden.present
  }

  // Two sequences of unequal length in one batch: the shorter padded on the right.
  const short = await tiny.promptEmbeddings([userMessage('Hello')], [])
  const both = new Float32Array(2 * length * width)
  both.set(x)
  both.set(short.x, length * width)
  const mask = [...ones(length), ...ones(short.length), ...Array<number>(length - short.length).fill(0)]
  const batch = (await tiny.decode(both, 2, mask, [...range(0, length), ...range(0, length)])).logits.data as Float32Array
  const alone = (await tiny.decode(short.x, 1, ones(short.length), range(0, short.length))).logits.data as Float32Array
  t.ok(distance(all, batch.subarray(0, all.length)) < 1e-3)
  t.ok(distance(alone, batch.subarray(length * vocab, length * vocab + alone.length)) < 1e-3)
})

await t.test('answers are right, kind by kind', async t => {
  const { accuracy, misses } = await measure(tiny, SAMPLE, 20261123)
  for (const [kind, formats] of accuracy) {
    const { asked, right } = rate(formats.values())
    const least = kind === 'several' ? 0.9 : 0.95
    t.ok(right / asked >= least, `${kind}: ${right} of ${asked}`, { misses: misses.filter(m => m.kind === kind) })
  }
})

/** A question about one thing whose answer differs between two scenes. */
function tellingQuestion (a: Scene, b: Scene, before: Thing): Question | undefined {
  const options: Array<[string, (scene: Scene) => string]> = [
    [`How many ${before.colour} ${before.shape === 'cross' ? 'crosses' : before.shape + 's'} are there?`, scene => String(countOf(scene, before))],
    [`Is there a ${before.colour} ${before.shape}?`, scene => countOf(scene, before) > 0 ? 'yes' : 'no'],
    ['Describe the picture.', describeScene]
  ]
  const found = options.filter(([, of]) => of(a) !== of(b))[(before.x | 0) % 2] ?? options.find(([, of]) => of(a) !== of(b))
  return found === undefined ? undefined : { kind: 'count', text: found[0], answer: found[1](b) }
}

await t.test('a picture that differs in one object gets another answer', async t => {
  const random = seededRandom(95)
  let told = 0
  for (let i = 0; i < PAIRS; i++) {
    const scene = makeScene(random, { longest: 400 })
    const changed = changeOne(random, scene)
    const question = tellingQuestion(scene, changed.scene, changed.before) as Question
    const format = pick(random, ['png', 'jpeg', 'webp'] as const)
    const one = await tiny.see(await renderScene(scene, format))
    const two = await tiny.see(await renderScene(changed.scene, format))
    if (await tiny.ask(question.text, [one]) !== await tiny.ask(question.text, [two])) told++
  }
  t.ok(told >= 0.95 * PAIRS, `${told} of ${PAIRS}`)
})

await t.test('with the features of another picture the answer is about that picture', async t => {
  const random = seededRandom(7)
  for (let i = 0; i < SWAPS; i++) {
    const scenes = [makeScene(random), makeScene(random)] as const
    const seen = await Promise.all(scenes.map(async scene => await tiny.see(await renderScene(scene))))
    const answers = await Promise.all(seen.map(async s => await tiny.ask('Describe the picture.', [s])))
    t.same(answers, scenes.map(describeScene))
    // Only when both take the same number of tokens can one stand in for the other unnoticed.
    if (seen[0]?.numTokens !== seen[1]?.numTokens) continue
    const swapped = [{ ...seen[0], rows: seen[1]?.rows }, { ...seen[1], rows: seen[0]?.rows }] as typeof seen
    t.same(await Promise.all(swapped.map(async s => await tiny.ask('Describe the picture.', [s]))), [...answers].reverse())
  }
})

await t.test('conversations: system message, earlier turns, no picture, pictures of another size', async t => {
  const random = seededRandom(11)
  const scene = makeScene(random, { count: 4 })
  const seen = await tiny.see(await renderScene(scene, 'jpeg'))
  const system = { role: 'system', content: 'You are a helpful assistant.' }
  const questions = questionsFor(scene, random)
  for (const { kind, text, answer } of questions) t.equal(await tiny.answer([system, userMessage(text, 1)], [seen]), answer, kind)
  const [first, second] = [questions[0], questions.at(-1)] as [Question, Question]
  t.equal(
    await tiny.answer([userMessage(first.text, 1), { role: 'assistant', content: first.answer }, userMessage(second.text)], [seen]),
    second.answer, 'a second question about the same picture'
  )
  t.match(await tiny.ask('Hello'), /^Hello!/)
  t.match(await tiny.ask('What can you do?'), /count shapes/)
  t.equal(await tiny.ask('What is 3 plus 4?'), '7')
  t.equal(await tiny.ask('How many red circles are there?'), 'I see no picture.')
  t.equal(await tiny.ask('Count to 12.'), '1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12.')
})

await t.test('the example pictures of the documentation', async t => {
  const examples = join(tinyModelDir, '../../../docs/examples')
  const expected = {
    'shapes.png': '2 red circles, 1 blue star and 1 green square.',
    'shapes-2.jpg': '3 yellow triangles and 1 white cross.',
    'shapes-3.webp': '1 black cross, 1 blue triangle, 1 green circle, 1 orange star and 1 purple square.'
  }
  for (const [file, answer] of Object.entries(expected)) {
    t.equal(await tiny.ask('Describe the picture.', [await tiny.see(await readFile(join(examples, file)))]), answer, file)
  }
})
