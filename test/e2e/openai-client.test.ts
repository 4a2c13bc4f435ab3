import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import OpenAI, { APIError, AuthenticationError, BadRequestError, NotFoundError } from 'openai'
import type { ResponseInput } from 'openai/resources/responses/responses'
import type { ChatCompletionContentPart, ChatCompletionMessageParam } from 'openai/resources/chat/completions'
import t from 'tap'
import { packageRoot } from '../helper/package-root.ts'
import { startCli } from '../helper/cli.ts'
import { metric } from '../helper/metrics.ts'
import { until } from '../helper/until.ts'

const MODEL = 'tiny-internvl'
const EXAMPLES = join(packageRoot(), 'docs', 'examples')
const KEY = 'test-key'

const config = JSON.stringify({ embedded: { encoders: 1, engines: 1, backend: 'pytorch' }, apiKeys: [KEY] })
const dir = t.testdir({ 'epd.config.json': config })
const gateway = await startCli(t, ['serve', '--config', join(dir, 'epd.config.json'), '--port', '0', '--log-level', 'warn'])
const client = new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey: KEY, maxRetries: 0 })
const picture = await pictureUrl('shapes.png', 'image/png')

async function pictureUrl (name: string, mime: string): Promise<string> {
  return `data:${mime};base64,${(await readFile(join(EXAMPLES, name))).toString('base64')}`
}

function ask (question: string, ...urls: string[]): ChatCompletionMessageParam[] {
  const parts: ChatCompletionContentPart[] = urls.map(url => ({ type: 'image_url', image_url: { url } }))
  return [{ role: 'user', content: [...parts, { type: 'text', text: question }] }]
}

await t.test('a picture question is answered with usage', async t => {
  const answer = await client.chat.completions.create({ model: MODEL, messages: ask('Describe the picture.', picture), temperature: 0 })
  t.match(answer, { object: 'chat.completion', model: MODEL, choices: [{ finish_reason: 'stop', message: { role: 'assistant' } }] })
  t.ok(answer.choices[0]!.message.content!.length > 0)
  t.ok(answer.usage!.prompt_tokens > 16, 'the picture counts as prompt tokens')
  t.equal(answer.usage!.total_tokens, answer.usage!.prompt_tokens + answer.usage!.completion_tokens)
})

await t.test('the routed answer names plan, encoder and trace', async t => {
  const { response } = await client.chat.completions.create({ model: MODEL, messages: ask('How many shapes are there?', picture) }).withResponse()
  t.equal(response.headers.get('x-epd-plan'), 'e-pd')
  t.match(response.headers.get('x-epd-encoders'), /^http:\/\/127\.0\.0\.1:\d+$/)
  t.match(response.headers.get('x-epd-trace-id'), /^[0-9a-f]{32}$/)
  t.ok(response.headers.get('x-epd-reason'))
})

await t.test('a stream gives the same text as a whole answer, and usage when asked', async t => {
  const messages = ask('Describe the picture.', picture)
  const whole = await client.chat.completions.create({ model: MODEL, messages, temperature: 0 })
  const stream = await client.chat.completions.create({ model: MODEL, messages, temperature: 0, stream: true, stream_options: { include_usage: true } })
  let text = ''
  let usage
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? ''
    usage = chunk.usage ?? usage
  }
  t.equal(text, whole.choices[0]!.message.content)
  t.same(usage?.completion_tokens, whole.usage!.completion_tokens)
})

await t.test('stop, max_tokens, n and seed do what they say', async t => {
  const whole = (await client.chat.completions.create({ model: MODEL, messages: ask('Describe the picture.', picture), temperature: 0 })).choices[0]!.message.content!
  const stopAt = whole.split(' ')[1]!
  const stopped = await client.chat.completions.create({ model: MODEL, messages: ask('Describe the picture.', picture), temperature: 0, stop: [stopAt] })
  t.equal(stopped.choices[0]!.message.content, whole.slice(0, whole.indexOf(stopAt)))
  t.equal(stopped.choices[0]!.finish_reason, 'stop')

  const short = await client.chat.completions.create({ model: MODEL, messages: ask('Describe the picture.', picture), temperature: 0, max_tokens: 2 })
  t.equal(short.choices[0]!.finish_reason, 'length')
  t.equal(short.usage!.completion_tokens, 2)

  const hot = { model: MODEL, messages: ask('Describe the picture.', picture), temperature: 2, n: 8, seed: 7, max_tokens: 40 }
  const [once, again] = [await client.chat.completions.create(hot), await client.chat.completions.create(hot)]
  t.equal(once.choices.length, 8)
  t.same(once.choices.map(c => c.message.content), again.choices.map(c => c.message.content), 'the same seed gives the same answers')
  t.ok(new Set(once.choices.map(c => c.message.content)).size > 1, 'choices differ from each other')
})

await t.test('several pictures keep their order', async t => {
  const other = await pictureUrl('shapes-2.jpg', 'image/jpeg')
  const both = await client.chat.completions.create({ model: MODEL, messages: ask('Describe the picture.', picture, other), temperature: 0 }).withResponse()
  t.equal(both.response.headers.get('x-epd-encoders')!.split(',').length, 2)
})

await t.test('an aborted stream frees everything in the engine', async t => {
  const forever = { model: MODEL, messages: ask('Describe the picture.', picture), stream: true as const, max_tokens: 2000, ignore_eos: true }
  const stream = await client.chat.completions.create(forever)
  let chunks = 0
  for await (const chunk of stream) {
    chunks += chunk.choices.length
    stream.controller.abort()
  }
  t.ok(chunks > 0 && chunks < 100, 'the stream ended early')
  const nodes = Object.keys(await (await fetch(`${gateway.url}/nodes/status`)).json() as object)
  await until(async () => (await Promise.all(nodes.map(async url => {
    const text = await (await fetch(`${url}/metrics`)).text()
    return metric(text, 'epd_leases_open') === 0 && metric(text, 'epd_sequences', { status: 'RUNNING' }) === 0
  }))).every(Boolean), 'no lease is open and nothing runs')
})

await t.test('a wrong model, a wrong picture and a wrong key are proper errors', async t => {
  const failure = async (of: OpenAI, model: string, messages: ChatCompletionMessageParam[]): Promise<unknown> => await of.chat.completions.create({ model, messages }).then(() => undefined, (err: unknown) => err)
  const unknown = await failure(client, 'no-such-model', ask('Hello'))
  t.ok(unknown instanceof NotFoundError)
  t.equal((unknown as APIError).code, 'model_not_found')
  const bad = await failure(client, MODEL, ask('Hello', 'data:image/png;base64,AAAA'))
  t.ok(bad instanceof BadRequestError)
  t.equal((bad as APIError).param, 'messages[0].content[0]')
  const stranger = new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey: 'wrong', maxRetries: 0 })
  t.ok(await failure(stranger, MODEL, ask('Hello')) instanceof AuthenticationError)
})

await t.test('responses: whole, streamed, of a picture and of a given form', async t => {
  const input: ResponseInput = [{ role: 'user', content: [{ type: 'input_image', image_url: picture, detail: 'auto' }, { type: 'input_text', text: 'Describe the picture.' }] }]
  const chat = await client.chat.completions.create({ model: MODEL, messages: [{ role: 'system', content: 'Answer.' }, ...ask('Describe the picture.', picture)], temperature: 0 })
  const whole = await client.responses.create({ model: MODEL, instructions: 'Answer.', input, temperature: 0 })
  t.match(whole, { object: 'response', status: 'completed', model: MODEL, instructions: 'Answer.' })
  t.equal(whole.output_text, chat.choices[0]!.message.content, 'the same as a chat')
  t.match(whole.usage, { input_tokens: chat.usage!.prompt_tokens, output_tokens: chat.usage!.completion_tokens, total_tokens: chat.usage!.total_tokens })

  const stream = client.responses.stream({ model: MODEL, instructions: 'Answer.', input, temperature: 0 })
  const types: string[] = []
  for await (const event of stream) types.push(event.type)
  const final = await stream.finalResponse()
  t.same(types.filter((type, i) => type !== types[i - 1]), ['response.created', 'response.in_progress', 'response.output_item.added', 'response.content_part.added', 'response.output_text.delta', 'response.output_text.done', 'response.content_part.done', 'response.output_item.done', 'response.completed'])
  t.equal(final.output_text, whole.output_text)
  t.same(final.usage?.output_tokens, whole.usage?.output_tokens)

  const short = await client.responses.create({ model: MODEL, input: 'How are you?', max_output_tokens: 2 })
  t.match(short, { status: 'incomplete', incomplete_details: { reason: 'max_output_tokens' } })
  const formed = await client.responses.create({ model: MODEL, input, text: { format: { type: 'json_schema', name: 'count', strict: true, schema: { type: 'object', properties: { count: { type: 'integer', minimum: 0, maximum: 9 } }, required: ['count'], additionalProperties: false } } } })
  t.match(JSON.parse(formed.output_text), { count: Number })
  const refused: unknown = await client.responses.create({ model: MODEL, input: 'Go on.', previous_response_id: 'resp_1' }).catch((err: unknown) => err)
  t.match(refused, { status: 400, param: 'previous_response_id' })
})

await t.test('models are listed once', async t => {
  t.same((await client.models.list()).data.map(model => model.id), [MODEL])
})
