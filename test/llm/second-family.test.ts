/**
 * Engines are not made for the shipped model: a Qwen2-VL, exported by public tooling, answers with PyTorch's own tokens,
 * whichever way its requests take. Its positions have three axes, its pictures as many tokens as they are large, and its
 * decoder has no `delta.*` outputs.
 */
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import type { EngineRole } from '../../engines/service/engine-service.ts'
import type { EncoderEngine } from '../../engines/encoder/index.ts'
import type { LlmService } from '../../engines/llm/index.ts'
import { loadTokenizer } from '../../engines/llm/text/tokenizer.ts'
import { startEngine } from '../../engines/server/index.ts'
import epd from '../../plugin/index.ts'
import { chatBody, picturesOf, pictureUrl, qwenModelDir as modelDir, reference, tokensOf, type ReferencePrompt } from '../helper/qwen2-vl.ts'
import { startTurbomind } from '../turbomind/harness.ts'
import { ask, base, checkIdle, encode, link, startEncoder, startLlm, user, type Completion } from './harness.ts'

type Ask = (prompt: ReferencePrompt) => Promise<Completion>

interface House {
  readonly ask: Ask
  /** What must be at rest in the end. */
  readonly engines: ReadonlyArray<LlmService | EncoderEngine>
}

function alone (engine: LlmService): House {
  return { engines: [engine], ask: async prompt => await ask(engine, chatBody(prompt)) }
}

/** Pictures go to the encoder, and to the engine the prompt with leases in their places. */
async function behindEncoder (t: Test, engine: LlmService): Promise<House> {
  const encoder = await startEncoder(t, { modelDir })
  await link(engine, encoder)
  return {
    engines: [encoder, engine],
    async ask (prompt) {
      const pictures = picturesOf(prompt)
      if (pictures.length === 0) return await ask(engine, chatBody(prompt))
      const results = await encode(encoder, pictures.map(pictureUrl))
      const leases = results.map(({ lease }) => lease)
      return await ask(engine, { ...chatBody(prompt, () => `epd:${leases.shift()}`), encoder_result: results })
    }
  }
}

/** A gateway and engines over HTTP; each engine hands on to the next. Only encoders open the vision encoder's file. */
async function behindGateway (t: Test, roles: readonly EngineRole[], plan: string): Promise<House & { post (body: object): Promise<Completion> }> {
  const app = Fastify({ forceCloseConnections: true })
  t.teardown(() => app.close())
  await app.register(epd, { embedded: false, bypass: 'never' })
  const proxyUrl = await app.listen({ host: '127.0.0.1', port: 0 })
  const urls = await Promise.all(roles.map(async role => {
    const engine = await startEngine({ ...base, modelDir, role, port: 0, vision: role === 'encoder', proxyUrl })
    t.teardown(() => engine.close())
    return engine.url
  }))
  const pairs = urls.slice(1).map((url, i) => [urls[i], url] as [string, string])
  await app.epd.nodes.waitFor(({ byId, link }) => urls.every(url => byId.has(url)) && pairs.every(([from, to]) => link(from, to) === 'linked'), { signal: AbortSignal.timeout(10_000) })
  const post = async (body: object): Promise<Completion> => {
    const response = await fetch(`${proxyUrl}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) })
    const found = response.headers.get('x-epd-plan')
    if (JSON.stringify(body).includes('image_url') && found !== plan) throw new Error(`the plan was ${found}`)
    return await response.json() as Completion
  }
  return { engines: [], post, ask: async prompt => await post(chatBody(prompt)) }
}

const encoderBehindGateway = behindGateway(t, ['encoder', 'hybrid'], 'e-pd')

/** Every way a request can take. Small chunks and few blocks or slots: prompts are cut inside pictures, and rows of a step differ in length. */
const HOUSES: Readonly<Record<string, (t: Test) => Promise<House>>> = {
  'hybrid by itself': async t => alone(await startLlm(t, { modelDir })),
  'hybrid in chunks of 16 tokens, with few blocks': async t => alone(await startLlm(t, { modelDir, kvBlocks: 20 }, { maxPrefillTokens: 16 })),
  'E -> TurboMind-like PD': async t => await behindEncoder(t, await startTurbomind(t, { modelDir, vision: false, maxBatchSize: 3, kvBlocks: 4, maxPrefillTokens: 16 })),
  'E -> PD behind a gateway': async () => await encoderBehindGateway,
  'E -> P -> D behind a gateway': async t => await behindGateway(t, ['encoder', 'prefill', 'decode'], 'e-p-d')
}

const { tokenizer } = await loadTokenizer(modelDir)
const prompts = Object.entries(reference.prompts)

function compare (t: Test, answer: Completion, name: string, { ids, grids, tokens }: ReferencePrompt): void {
  // A token is known by its bytes: no two of a byte-level vocabulary are spelt alike.
  t.same(answer.choices[0]?.logprobs?.content.map(({ bytes }) => bytes), tokens.map(token => [...tokenizer.bytes(token)]), `${name}: the tokens are PyTorch's`)
  const { prompt_tokens: promptTokens, prompt_tokens_details: { image_tokens: imageTokens } } = answer.usage
  t.same([promptTokens, imageTokens], [ids.length, grids.reduce((sum, grid) => sum + tokensOf(grid), 0)])
}

t.test('the reference is significant: no choice is close, and other pictures have other answers', async t => {
  t.ok(prompts.every(([, { margin }]) => margin > 1e-3))
  t.equal(new Set(prompts.map(([, { tokens }]) => tokens.join())).size, prompts.length)
  t.same(reference.prompts['one picture']?.ids, reference.prompts['another picture, same words']?.ids)
})

for (const [name, open] of Object.entries(HOUSES)) {
  t.test(name, async t => {
    const house = await open(t)
    // All at once first, while no picture has been seen yet; then one by one, with pictures and prefixes kept.
    const together = await Promise.all(prompts.map(async ([name, prompt]) => ({ name, prompt, answer: await house.ask(prompt) })))
    for (const { name, prompt, answer } of together) compare(t, answer, name, prompt)
    for (const [name, prompt] of prompts) compare(t, await house.ask(prompt), name, prompt)
    await checkIdle(t, ...house.engines)
  })
}

t.test('a request chooses the size of its pictures, one by one or all at once, and the gateway hands that on', async t => {
  const { post } = await encoderBehindGateway
  const imageTokens = async (settings: object, more: object): Promise<number> => {
    const content = [{ type: 'image_url', image_url: { url: pictureUrl('large'), ...settings } }, { type: 'text', text: 'What do you see?' }]
    return (await post({ model: 'qwen2-vl-random', messages: [user(content)], max_tokens: 1, ...more })).usage.prompt_tokens_details.image_tokens
  }
  t.equal(await imageTokens({}, {}), 54)
  t.equal(await imageTokens({ max_pixels: 28 * 28 * 20 }, {}), 15)
  t.equal(await imageTokens({}, { mm_processor_kwargs: { image: { max_pixels: 28 * 28 * 20 } } }), 15)
  t.equal(await imageTokens({ resized_width: 56, resized_height: 112 }, {}), 8)
})
