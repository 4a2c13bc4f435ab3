/** What /v1/responses takes and refuses; test/e2e/openai-client.test.ts has the answers, as OpenAI's SDK reads them. */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import t from 'tap'
import type { ChatAnswer } from '../../engines/service/engine-service.ts'
import { drawScene } from '../helper/scenes.ts'
import { checkIdle, encode, failure, link, startEncoder, startLlm } from './harness.ts'

t.test('responses', async t => {
  const encoder = await startEncoder(t)
  const engine = await startLlm(t)
  await link(engine, encoder)
  let requests = 0
  const respond = async (body: object): Promise<ChatAnswer> => await engine.responses({ body, signal: new AbortController().signal, requestId: `response-${++requests}`, context: ROOT_CONTEXT })
  const textOf = async (body: object): Promise<string> => ((await respond(body)) as { json: { output: [{ content: [{ text: string }] }] } }).json.output[0].content[0].text
  const part = (url: string): object => ({ type: 'input_image', image_url: url })
  const question = { type: 'input_text', text: 'Describe the picture.' }

  await t.test('a picture may come as an encoder\'s result', async t => {
    const picture = await drawScene(4)
    const seen = await textOf({ input: [{ role: 'user', content: [part(picture), question] }], temperature: 0 })
    const results = await encode(encoder, [picture])
    t.equal(await textOf({ input: [{ role: 'user', content: [part(`epd:${results[0]!.lease}`), question] }], encoder_result: results, temperature: 0 }), seen)
  })

  await t.test('an answer of before is a message like others', async t => {
    const input = [{ role: 'user', content: 'How are you?' }, { type: 'message', id: 'msg_1', role: 'assistant', content: [{ type: 'output_text', text: 'Well.', annotations: [] }] }, { role: 'user', content: 'And now?' }]
    t.ok((await textOf({ input })).length > 0)
  })

  await t.test('log probabilities are in the text\'s part', async t => {
    const { json } = await respond({ input: 'How are you?', include: ['message.output_text.logprobs'], top_logprobs: 2, max_output_tokens: 3 }) as { json: object }
    t.match(json, { output: [{ content: [{ logprobs: [{ token: String, top_logprobs: [{}, {}] }] }] }] })
  })

  await t.test('what is wrong is refused with its place', async t => {
    const text = [{ role: 'user', content: 'x' }]
    const cases: Array<[object, string]> = [
      [{}, 'input'], [{ input: 5 }, 'input'], [{ input: null }, 'input'], [{ input: [] }, 'input'], [{ input: '' }, 'messages'], [{ input: {} }, 'input'], [{ input: [5] }, 'input[0]'], [{ input: [null] }, 'input[0]'],
      [{ input: [{ type: 'function_call_output', call_id: 'a', output: 'x' }] }, 'input[0].type'], [{ input: [{ type: {}, role: 'user' }] }, 'input[0].type'], [{ input: [{ role: 'user', content: 5 }] }, 'input[0].content'],
      [{ input: [{ role: 'user', content: [{ type: 'input_text', text: 5 }] }] }, 'input[0].content[0].text'], [{ input: [{ role: 'user', content: [{ type: 'input_file', file_id: 'a' }] }] }, 'input[0].content[0]'],
      [{ input: [{ role: 'user', content: [{ type: 'input_image', image_url: 5 }] }] }, 'input[0].content[0]'], [{ input: [{ role: '__proto__', content: 'x' }] }, 'input[0].role'],
      [{ input: text, instructions: 5 }, 'instructions'], [{ input: text, max_output_tokens: '5' }, 'max_output_tokens'], [{ input: text, text: 'json' }, 'text'], [{ input: text, text: { format: 'json' } }, 'text.format'], [{ input: text, text: { format: { type: 'json_schema', name: 'a', schema: { type: 'string', pattern: 'a' } } } }, 'text.format.schema.pattern'],
      [{ input: text, previous_response_id: 'resp_1' }, 'previous_response_id'], [{ input: text, conversation: 'c' }, 'conversation'], [{ input: text, n: 2 }, 'n'], [{ input: text, tools: [{ type: 'web_search' }] }, 'tools']
    ]
    for (const [body, param] of cases) {
      const refused = await failure(respond(body))
      if (param === 'messages') t.not(refused?.status, 500)
      else t.match(refused, { status: 400, param }, JSON.stringify(body))
    }
  })

  await checkIdle(t, engine, encoder)
})
