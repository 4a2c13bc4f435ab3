import t from 'tap'
import { BytesDetokenizer, TextDetokenizer } from '../../engines/llm/text/detokenizer.ts'
import { Sampler, uniform } from '../../engines/llm/runner/sampler.ts'
import { GREEDY, type SamplingParams, type SampledToken } from '../../engines/llm/sequence/sampling.ts'
import { StopStrings } from '../../engines/llm/text/stop-strings.ts'
import { readGeneration } from '../../engines/llm/api/sampling.ts'
import { loadTokenizer, byteLevelBytes, encodeText } from '../../engines/llm/text/tokenizer.ts'
import { loadModel } from '../../engines/models/index.ts'
import { floatRow } from '../../engines/llm/runner/elements.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'

const TEXT = 'naïve 日本語 👩‍👩‍👧 \ufeff“q” \u0000 é Ω — ok\n'

function sampler (params: Partial<SamplingParams>, tokens: readonly number[] = [], promptLength = tokens.length): Sampler {
  return new Sampler({ ...GREEDY, ...params }, tokens, promptLength)
}

function many (params: Partial<SamplingParams>, logits: readonly number[], draws = 2000): number[] {
  const one = sampler(params)
  const counts = logits.map(() => 0)
  for (let i = 0; i < draws; i++) counts[one.sample(Float32Array.from(logits)).token]! += 1
  return counts.map(n => n / draws)
}

t.test('text comes out whole wherever tokens cut its bytes', async t => {
  const bytes = Buffer.from(TEXT)
  for (let size = 1; size <= 7; size++) {
    const chunks: Uint8Array[] = []
    for (let at = 0; at < bytes.length; at += size) chunks.push(bytes.subarray(at, at + size))
    const d = new BytesDetokenizer(token => chunks[token])
    let text = ''
    for (const i of chunks.keys()) {
      const piece = d.push(i)
      t.notOk(piece.includes('\ufffd'))
      text += piece
    }
    t.equal(text + d.flush(), TEXT)
  }
})

t.test('bytes that are no UTF-8 become replacement characters, at the end too', async t => {
  const d = new BytesDetokenizer(token => token < 0 ? undefined : Uint8Array.of(token))
  t.equal(d.push(0xe6) + d.push(0x97) + d.push(-1) + d.push(0x41), '\ufffdA')
  t.equal(d.push(0xf0), '')
  t.equal(d.flush(), '\ufffd')
})

t.test('a decoder that looks at its neighbours is given a window', async t => {
  // Drops the space at the beginning, as SentencePiece decoders do, and puts bytes together across tokens.
  const pieces = ['▁Hello', '▁wor', 'ld', 0xe6, 0x97, 0xa5, '▁!']
  const decode = (tokens: number[]): string => {
    const bytes = tokens.map(i => typeof pieces[i] === 'number' ? Buffer.of(pieces[i] as number) : Buffer.from((pieces[i] as string).replace('▁', ' ')))
    return Buffer.concat(bytes).toString('utf8').replace(/^ /, '')
  }
  const d = new TextDetokenizer(decode)
  const out = pieces.map((_, i) => d.push(i))
  t.same(out, ['Hello', ' wor', 'ld', '', '', '日', ' !'])
  t.equal(d.flush(), '')
  const held = new TextDetokenizer(decode)
  t.equal(held.push(3), '')
  t.equal(held.flush(), '\ufffd')
})

t.test('the model\'s own tokenizer gives back any text, special tokens only when asked', async t => {
  const { tokenizer } = await loadTokenizer(tinyModelDir)
  const stream = (ids: number[], skip: boolean): string => {
    const d = tokenizer.detokenizer(skip)
    return ids.map(id => d.push(id)).join('') + d.flush()
  }
  t.equal(stream(tokenizer.encode(TEXT), true), TEXT)
  const ids = tokenizer.encode('<|im_start|>hi<|im_end|>')
  t.equal(stream(ids, true), 'hi')
  t.equal(stream(ids, false), '<|im_start|>hi<|im_end|>')
  t.same(tokenizer.bytes(10 ** 9), new Uint8Array(0))
  t.equal(byteLevelBytes('日'), undefined)
  t.equal(tokenizer.specialText.eos_token, '<|im_end|>')
})

t.test('a text that is far too long is refused after its beginning, one that may fit is encoded whole', async t => {
  const { tokenizer } = await loadTokenizer(tinyModelDir)
  let read = 0
  const counting = { encode: (text: string): number[] => { read += text.length; return tokenizer.encode(text) } }
  t.throws(() => encodeText(counting, 'x'.repeat(3e6), 4096, 'messages'), { code: 'context_length_exceeded', param: 'messages', message: /more than 8192/ })
  t.ok(read < 1e5, `${read} characters were looked at`)
  const dense = '<|endoftext|>'.repeat(4000)
  t.equal(encodeText(counting, dense, 4096, 'prompt').length, 4000, 'thirteen characters to a token')
  t.same(encodeText(counting, TEXT, 4096, 'prompt'), tokenizer.encode(TEXT))
})

t.test('stop strings are found across any boundary, and nothing of them is shown', async t => {
  const text = 'one two STOP three'
  for (let size = 1; size < 8; size++) {
    for (const include of [false, true]) {
      const s = new StopStrings(['STOP', 'three'], include)
      let out = ''
      for (let at = 0; at < text.length && !s.found; at += size) out += s.push(text.slice(at, at + size))
      t.ok(s.found)
      t.equal(out + s.flush(), include ? 'one two STOP' : 'one two ')
      t.equal(s.push('more'), '')
    }
  }
  const never = new StopStrings(['</s>'], false)
  t.equal(never.push('a </') + never.push('b <') + never.flush(), 'a </b <', 'what only looked like one is text')
})

t.test('greedy takes the largest, of equal ones the first', async t => {
  t.equal(sampler({}).sample(Float32Array.of(1, 3, 3, 2)).token, 1)
})

t.test('draws follow the distribution, and depend on seed and step alone', async t => {
  const p = many({ temperature: 1, seed: 5 }, [Math.log(0.5), Math.log(0.3), Math.log(0.2)])
  for (const [i, expected] of [0.5, 0.3, 0.2].entries()) t.ok(Math.abs(p[i]! - expected) < 0.04, `${p[i]} ~ ${expected}`)
  const draw = (seed: number, from: number): number[] => {
    const history = Array.from({ length: from }, () => 0)
    const one = new Sampler({ ...GREEDY, temperature: 1, seed }, history, 0)
    return Array.from({ length: 20 - from }, () => one.sample(new Float32Array(50)).token)
  }
  t.same(draw(7, 8), draw(7, 0).slice(8), 'a sequence that was evicted goes on where it was')
  t.notSame(draw(7, 0), draw(8, 0))
  const values = Array.from({ length: 1000 }, (_, i) => uniform(3, i))
  t.ok(values.every(v => v >= 0 && v < 1) && Math.abs(values.reduce((a, b) => a + b) / 1000 - 0.5) < 0.05)
})

t.test('top-k, top-p and min-p leave out what they say', async t => {
  const logits = [0.5, 0.25, 0.15, 0.1].map(Math.log)
  t.same(many({ temperature: 1, topK: 2 }, logits).map(p => p > 0), [true, true, false, false])
  t.same(many({ temperature: 1, topP: 0.7 }, logits).map(p => p > 0), [true, true, false, false])
  t.same(many({ temperature: 1, topP: 0 }, logits).map(p => p > 0), [true, false, false, false], 'the most likely token always stays')
  t.same(many({ temperature: 1, minP: 0.4 }, logits).map(p => p > 0), [true, true, false, false])
  t.ok(many({ temperature: 0.2 }, logits)[0]! > 0.9, 'a low temperature sharpens')
})

t.test('penalties, biases and minimum lengths change what is chosen', async t => {
  const logits = (): Float32Array => Float32Array.of(2, 1.9, -1)
  t.equal(sampler({ repetitionPenalty: 1.5 }, [0]).sample(logits()).token, 1, 'also for what stands in the prompt')
  t.equal(sampler({ repetitionPenalty: 1.5 }, [2]).sample(Float32Array.of(-1.2, -5, -1)).token, 0, 'negative logits are made smaller')
  t.equal(sampler({ presencePenalty: 0.5 }, [0], 0).sample(logits()).token, 1)
  t.equal(sampler({ presencePenalty: 0.5 }, [0], 1).sample(logits()).token, 0, 'but not for the prompt')
  t.equal(sampler({ frequencyPenalty: 0.06 }, [0, 0], 0).sample(logits()).token, 1)
  t.equal(sampler({ frequencyPenalty: 0.06 }, [0], 0).sample(logits()).token, 0)
  t.equal(sampler({ logitBias: [[2, 100]] }).sample(logits()).token, 2)
  const s = sampler({ minTokens: 2, eosIds: [0], stopIds: [1] })
  t.same([1, 2, 3].map(() => s.sample(logits()).token), [2, 2, 0])
})

t.test('each parameter of a request reaches the sampler under its own name', async t => {
  const model = await loadModel(tinyModelDir, { vision: false, decoder: false })
  const body = {
    temperature: 0.5,
    top_p: 0.25,
    top_k: 7,
    min_p: 0.125,
    seed: 9,
    repetition_penalty: 1.5,
    presence_penalty: -1,
    frequency_penalty: 2,
    logit_bias: { 3: -100 },
    min_tokens: 4,
    ignore_eos: true,
    stop_token_ids: [5],
    n: 2,
    max_tokens: 6,
    stop: 'x',
    include_stop_str_in_output: true,
    skip_special_tokens: false,
    stream: true,
    stream_options: { include_usage: true }
  }
  t.same(readGeneration(body, model, 8), {
    n: 2,
    maxTokens: 6,
    stop: ['x'],
    includeStop: true,
    skipSpecial: false,
    stream: true,
    sampling: {
      temperature: 0.5,
      topP: 0.25,
      topK: 7,
      minP: 0.125,
      seed: 9,
      repetitionPenalty: 1.5,
      presencePenalty: -1,
      frequencyPenalty: 2,
      logitBias: [[3, -100]],
      minTokens: 4,
      ignoreEos: true,
      eosIds: model.text.eosIds,
      stopIds: [5],
      topLogprobs: 8
    }
  })
  t.match(readGeneration({ max_tokens: 6, max_completion_tokens: 5, min_new_tokens: 3, top_k: -1 }, model, undefined), { maxTokens: 5, stream: false, sampling: { temperature: 0, topK: 0, minTokens: 3, topLogprobs: undefined } })
  t.equal(readGeneration({}, model, undefined).maxTokens, 256, 'generation_config.json says so')
})

t.test('log probabilities are the model\'s own, whatever was done to the logits', async t => {
  const one = (params: Partial<SamplingParams>): SampledToken => sampler({ topLogprobs: 2, ...params }).sample(Float32Array.from([0.7, 0.2, 0.1].map(Math.log)))
  for (const params of [{}, { logitBias: [[2, 100]] as const }, { temperature: 0.1 }]) {
    const { token, logprob, top } = one(params)
    t.equal(token, 'logitBias' in params ? 2 : 0)
    t.ok(Math.abs(Math.exp(logprob!) - [0.7, 0.2, 0.1][token]!) < 1e-6)
    t.same(top?.map(entry => entry.token), [0, 1])
    t.ok(Math.abs(Math.exp(top![1]!.logprob) - 0.2) < 1e-6)
  }
  t.equal(sampler({ topLogprobs: 0 }).sample(Float32Array.of(0, 1)).top?.length, 0)
})

t.test('float16 logits are read as numbers', async t => {
  t.same([...floatRow(Uint16Array.of(0, 0x3c00, 0xbc00, 0x7bff, 0x0001, 0x7c00), 0, 6)], [0, 1, -1, 65504, 2 ** -24, Infinity])
  t.same([...floatRow(Float32Array.of(1, 2, 3, 4), 1, 2)], [3, 4])
})
