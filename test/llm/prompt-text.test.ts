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

t.test('what was told is tokenised once, also when the request comes meanwhile; when that fails the request does it itself', async t => {
  const texts: string[] = []
  const counting = { ...tokenizer, longest: tokenizer.longest, specialText: tokenizer.specialText, encode: (text: string) => { texts.push(text); return tokenizer.encode(text) }, detokenizer: () => t.fail('used') as never, bytes: () => t.fail('used') as never }
  const text = new PromptText({ dir: tinyModelDir, tokenizer: counting, template, maxLength: () => 100_000, log })
  t.teardown(() => text.close())
  const job = (content: string) => ({ input: { messages: [user(content)], kwargs: {} }, param: 'messages' })
  const [told, asked] = await Promise.all([text.prepare(job('one'), never), text.encode(job('one'), never)])
  t.same(asked, told)
  t.equal(texts.length, 1)
  await text.prepare(job('two'), never)
  t.same(await text.encode(job('two'), never), tokenizer.encode(template.render([user('two')])))
  t.equal(texts.length, 2)
  await text.encode(job('two'), never)
  t.equal(texts.length, 3, 'it is remembered for one request')

  const long = job('How many red circles are there? '.repeat(400))
  const left = new AbortController()
  const telling = text.prepare(long, left.signal)
  const asking = text.encode(long, never)
  left.abort()
  await t.rejects(telling)
  t.same(await asking, tokenizer.encode(template.render(long.input.messages)))
  for (let i = 0; i < 100; i++) await text.prepare(job(`never ${i}`), never)
  texts.length = 0
  for (let i = 0; i < 100; i++) await text.encode(job(`never ${i}`), never)
  t.equal(texts.length, 36, 'of those that never come the last 64 are remembered')
})
