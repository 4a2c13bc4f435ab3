import t from 'tap'
import { ChatTemplate } from '../../engines/llm/text/chat-template.ts'
import { PromptText } from '../../engines/llm/text/prompt-text.ts'
import { loadTokenizer } from '../../engines/llm/text/tokenizer.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'
import { log } from './harness.ts'

const never = AbortSignal.any([])
const { tokenizer, config } = await loadTokenizer(tinyModelDir)
const template = await ChatTemplate.load(tinyModelDir, config, tokenizer.specialText)
const user = (content: string) => ({ role: 'user', content })

t.test('a long prompt has the tokens it would have if it were short', async t => {
  const text = new PromptText({ dir: tinyModelDir, tokenizer, template, maxLength: () => 100_000, log })
  t.teardown(() => text.close())
  const long = 'How many red circles are there? Déjà vu 𝄞 '.repeat(400)
  t.same(await text.encode({ input: long, param: 'prompt' }, never), tokenizer.encode(long))
  const messages = Array.from({ length: 100 }, (_, i) => user(`message ${i}`))
  t.same(await text.encode({ input: { messages, kwargs: {} }, param: 'messages' }, never), tokenizer.encode(template.render(messages)))
  const [one] = messages as [ReturnType<typeof user>]
  const many = { list: Array.from({ length: 1000 }, (_, i) => i) }
  t.same(await text.encode({ input: { messages: [one], kwargs: many }, param: 'messages' }, never), tokenizer.encode(template.render([one])), 'also when its template arguments are many')
  await t.rejects(text.encode({ input: { messages: messages.map(() => ({ role: 'user', content: [{ type: 'text' as const, text: long }] })), kwargs: {} }, param: 'messages' }, never), { code: 'context_length_exceeded', param: 'messages' })
})

t.test('what can\'t fit the model is refused before it is rendered or tokenised', async t => {
  const unused = { ...tokenizer, longest: tokenizer.longest, encode: () => t.fail('tokenised') as never, detokenizer: () => t.fail('used') as never, bytes: () => t.fail('used') as never }
  const unrendered = { render: () => t.fail('rendered') as never } as unknown as ChatTemplate
  const text = new PromptText({ dir: '/nowhere', tokenizer: unused, template: unrendered, maxLength: () => 4096, log })
  const cases = [
    { messages: Array.from({ length: 100_000 }, () => user('a')), kwargs: {} },
    { messages: [{ role: 'user', content: Array.from({ length: 1_000_000 }, () => ({ type: 'text' as const, text: 'a' })) }], kwargs: {} },
    { messages: [user('x'.repeat(57_000_000))], kwargs: {} },
    'x'.repeat(57_000_000)
  ]
  for (const input of cases) await t.rejects(text.encode({ input, param: 'messages' }, never), { code: 'context_length_exceeded' })
})
