/** Tools: with the shipped model, whose template is replaced by one that has them. */
import { cp, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import t from 'tap'
import { ChatTemplate } from '../../engines/llm/text/chat-template.ts'
import { ToolCallParser, toolFormatOf, type ToolCall } from '../../engines/llm/text/tool-calls.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'
import { ask, checkIdle, events, failure, send, startLlm, user } from './harness.ts'

/** As Qwen's, in short. */
const TEMPLATE = `{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% if message.tool_calls %}{% for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}`

interface Called {
  choices: Array<{ finish_reason: string, message: { content: string | null, tool_calls?: Array<{ id: string, type: string, function: { name: string, arguments: string } }> } }>
}

async function modelWith (dir: string, template: string): Promise<string> {
  await cp(tinyModelDir, dir, { recursive: true })
  const path = join(dir, 'tokenizer_config.json')
  await writeFile(path, JSON.stringify({ ...JSON.parse(await readFile(path, 'utf8')) as object, chat_template: template }))
  return dir
}

const tool = (name: string, properties: object, more: object = {}): object => ({ type: 'function', function: { name, description: 'a tool', parameters: { type: 'object', properties, required: Object.keys(properties), additionalProperties: false }, ...more } })
const count = tool('count_shapes', { shape: { enum: ['circle', 'star'] }, least: { type: 'integer', minimum: 0, maximum: 9 } })
const place = tool('__proto__', { where: { enum: ['left', 'right'] } })
const question = { messages: [user('How many circles are there?')], max_tokens: 300, temperature: 0 }

t.test('calls are found in text that comes in any pieces', t => {
  const call = (name: string, args = '{"a": 1}'): string => `<tool_call>\n{"name": "${name}", "arguments": ${args}}\n</tool_call>`
  const cases: Array<[string, string, string[]]> = [
    ['plain < text <tool', 'plain < text <tool', []],
    [`Let me see.\n${call('one')}`, 'Let me see.', ['one']],
    [`${call('one')}\n${call('two')}\n`, '', ['one', 'two']],
    [`${call('one')} and then`, ' and then', ['one']],
    [call('unknown'), call('unknown'), []],
    [call('one', '[1]'), call('one', '[1]'), []],
    ['<tool_call>{"name": "one"}</tool_call>', '', ['one']],
    ['<tool_call>{"name": "one", </tool_call> text', '<tool_call>{"name": "one", </tool_call> text', []],
    ['<tool_call>{"name": "one"', '<tool_call>{"name": "one"', []],
    ['text \n ', 'text \n ', []],
    [call('__proto__', '{"__proto__": 1}'), '', ['__proto__']]
  ]
  for (const [whole, text, names] of cases) {
    for (let size = 1; size <= whole.length; size++) {
      const parser = new ToolCallParser(new Set(['one', 'two', '__proto__']))
      const calls: ToolCall[] = []
      let found = ''
      for (let at = 0; at < whole.length; at += size) {
        const piece = parser.push(whole.slice(at, at + size))
        found += piece.text
        calls.push(...piece.calls)
      }
      found += parser.flush()
      if (found !== text || calls.map(one => one.name).join() !== names.join()) return t.fail(`${JSON.stringify(whole)} in pieces of ${size}: ${JSON.stringify(found)}, ${calls.map(one => one.name).join()}`)
    }
  }
  t.end()
})

t.test('a template says how its model calls', t => {
  t.equal(toolFormatOf(TEMPLATE), 'tagged')
  t.equal(toolFormatOf('{{ messages }}'), 'none')
  t.equal(toolFormatOf('{% for tool in tools %}[TOOL_CALLS]'), 'other')
  t.equal(toolFormatOf('{% for tool in tools %}<tool_call><function=x>'), 'other')
  t.end()
})

t.test('an engine whose template has tools', async t => {
  const modelDir = await modelWith(t.testdir(), TEMPLATE)
  const engine = await startLlm(t, { modelDir, servedModelName: 'with-tools', vision: false })
  const call = async (body: object): Promise<Called['choices'][0]> => (await ask(engine, { ...question, ...body }) as unknown as Called).choices[0]!

  await t.test('a call that is asked for is made, and valid under its schema', async t => {
    for (const [choice, tools] of [['required', [count]], ['required', [place, count]], [{ type: 'function', function: { name: 'count_shapes' } }, [place, count]], [{ type: 'function', function: { name: '__proto__' } }, [place, count]]] as const) {
      const { message, finish_reason: reason } = await call({ tools, tool_choice: choice, parallel_tool_calls: false })
      t.equal(reason, 'tool_calls')
      t.equal(message.content, null)
      t.equal(message.tool_calls?.length, 1)
      const [made] = message.tool_calls!
      t.match(made, { id: /^call_/, type: 'function' })
      t.match(JSON.parse(made!.function.arguments), made!.function.name === '__proto__' ? { where: /^(left|right)$/ } : { shape: /^(circle|star)$/, least: Number })
    }
  })

  await t.test('a stream has the same calls', async t => {
    const body = { ...question, tools: [count], tool_choice: { type: 'function', function: { name: 'count_shapes' } } }
    const whole = await call(body)
    const list = await events(await send(engine, { ...body, stream: true })) as Array<{ choices: [{ delta: { content?: string, tool_calls?: Array<{ index: number, function: { arguments: string } }> }, finish_reason: string | null }] }>
    const chunks = list.slice(0, -1).map(chunk => chunk.choices[0])
    t.same(chunks.flatMap(({ delta }) => delta.tool_calls ?? []).map(one => [one.index, one.function.arguments]), [[0, whole.message.tool_calls![0]!.function.arguments]])
    t.equal(chunks.map(({ delta }) => delta.content ?? '').join(''), '')
    t.equal(chunks.at(-1)?.finish_reason, 'tool_calls')
  })

  await t.test('where the model may choose it answers in text, and is shown the tools unless it may call none', async t => {
    const shown = await ask(engine, { ...question, max_tokens: 5, tools: [count], tool_choice: 'auto' })
    const hidden = await ask(engine, { ...question, max_tokens: 5, tools: [count], tool_choice: 'none' })
    const without = await ask(engine, { ...question, max_tokens: 5 })
    t.same(hidden.choices, without.choices)
    t.ok(shown.usage.prompt_tokens > without.usage.prompt_tokens + 40)
    t.equal((await call({ tools: [tool('strict', {}, { strict: true })], max_tokens: 5 })).finish_reason, 'length', 'held to its form only where it calls')
  })

  await t.test('calls and their results come back as messages', async t => {
    const template = await ChatTemplate.load(modelDir, { chat_template: TEMPLATE }, {})
    const called = { role: 'assistant', content: null, tool_calls: [{ id: 'call_1', type: 'function', function: { name: 'count_shapes', arguments: '{"shape":"star","least":1}' } }] }
    t.ok(await call({ messages: [user('How many?'), called, { role: 'tool', tool_call_id: 'call_1', content: '3' }], tools: [count], max_tokens: 3 }))
    t.match(template.render([{ role: 'assistant', content: '', tool_calls: [{ type: 'function', id: 'a', function: { name: 'f', arguments: { a: 1 } } }] }]), '{"name": "f", "arguments": {"a": 1}}')
    for (const [message, param] of [[{ ...called, tool_calls: [{}] }, 'messages[0].tool_calls[0].function'], [{ ...called, tool_calls: [{ function: { name: 'f', arguments: '{' } }] }, 'messages[0].tool_calls[0].function.arguments'], [{ ...called, role: 'user' }, 'messages[0].tool_calls'], [{ role: 'function', content: 'x' }, 'messages[0].role'], [{ ...called, tool_calls: Array.from({ length: 2_000 }, () => called.tool_calls[0]) }, 'messages[0].tool_calls'], [{ ...called, tool_calls: [{ function: { name: 'f', arguments: `{"a":"${'x'.repeat(300_000)}"}` } }] }, 'messages[0].tool_calls[0].function.arguments']] as const) {
      t.match(await failure(call({ messages: [message, user('x')] })), { status: 400, param })
    }
  })

  await t.test('what is wrong or too large is refused with its place', async t => {
    let deep: object = { type: 'string' }
    for (let i = 0; i < 5_000; i++) deep = { type: 'array', items: deep }
    const cases: Array<[object, string]> = [
      [{ tools: {}, tool_choice: 'required' }, 'tool_choice'], [{ tools: 'x' }, 'tools'], [{ tools: [5] }, 'tools[0]'], [{ tools: [{ type: 'web_search' }] }, 'tools[0].type'], [{ tools: [{ type: 'function' }] }, 'tools[0].function'],
      [{ tools: [tool('a b', {})] }, 'tools[0].function.name'], [{ tools: [count, count] }, 'tools[1].function.parameters'], [{ tools: [{ type: 'function', function: { name: 'f', parameters: 5 } }] }, 'tools[0].function.parameters'],
      [{ tools: [tool('f', { deep })] }, 'tools'], [{ tools: Array.from({ length: 200 }, (_, i) => tool(`f${i}`, {})) }, 'tools'], [{ tools: [tool('f', { a: { enum: Array.from({ length: 30_000 }, (_, i) => i) } })] }, 'tools'],
      [{ tools: [count], tool_choice: { type: 'function', function: { name: 'other' } } }, 'tool_choice.function.name'], [{ tools: [count], tool_choice: 5 }, 'tool_choice'], [{ tool_choice: 'required' }, 'tool_choice'],
      [{ tools: [tool('f', { a: { type: 'string', pattern: '(a|a)*' } })], tool_choice: 'required' }, 'tools[0].function.parameters.properties.a.pattern'], [{ tools: [count], response_format: { type: 'json_object' } }, 'response_format'],
      [{ tools: [count], tool_choice: 'required', ignore_eos: true }, 'ignore_eos'], [{ chat_template_kwargs: { deep } }, 'chat_template_kwargs']
    ]
    for (const [body, param] of cases) t.match(await failure(call(body)), { status: 400, param }, param)
    // Where the model may choose, its arguments are held to nothing.
    t.ok(await call({ tools: [tool('f', { a: { type: 'string', pattern: 'x' } })], max_tokens: 2 }))
    t.match(await failure(call({ tools: Array.from({ length: 120 }, (_, i) => tool(`f${i}`, { a: { description: 'long '.repeat(40) } })) })), { status: 400, code: 'context_length_exceeded' })
  })

  await checkIdle(t, engine)
})

t.test('an engine whose template has none refuses tools, unless none may be called', async t => {
  const engine = await startLlm(t, { vision: false })
  t.match(await failure(ask(engine, { ...question, tools: [count] })), { status: 400, code: 'unsupported', param: 'tools' })
  t.match(await failure(ask(engine, { ...question, messages: [user('x'), { role: 'tool', content: 'x' }] })), { status: 400, code: 'unsupported', param: 'messages[1]' })
  t.ok(await ask(engine, { ...question, max_tokens: 2, tools: [count], tool_choice: 'none' }))
  await checkIdle(t, engine)
})
