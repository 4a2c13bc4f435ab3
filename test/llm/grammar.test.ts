/** Grammars of answers, without a model: what they let through is valid, whatever the schema. */
import { Ajv2020 } from 'ajv/dist/2020.js'
import t from 'tap'
import { begin, keyOf, step, type Node, type State } from '../../engines/llm/grammar/automaton.ts'
import { Grammar } from '../../engines/llm/grammar/constraint.ts'
import { ANY_OBJECT } from '../../engines/llm/grammar/json.ts'
import { schemaNode } from '../../engines/llm/grammar/schema.ts'
import { Vocabulary } from '../../engines/llm/grammar/vocabulary.ts'
import { EngineError } from '../../engines/service/errors.ts'
import { seeded } from '../helper/random.ts'

type Below = (below: number) => number

const ajv = new Ajv2020({ strict: false, ownProperties: true, formats: { date: /^\d{4}-\d\d-\d\d$/, 'date-time': (text: string) => !Number.isNaN(Date.parse(text)), time: true, uuid: /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/ } })

function accepts (node: Node, text: string): boolean {
  let state: State | undefined = begin(node)
  for (const byte of Buffer.from(text)) {
    state = step(state, byte)
    if (state === undefined) return false
  }
  return state.end
}

/** A text of the grammar, chosen at random; after a while it makes for the end. */
function writeText (node: Node, below: Below): string {
  let state = begin(node)
  const bytes: number[] = []
  const closing = Buffer.from('"}]')
  while (bytes.length < 3_000) {
    const next = Array.from({ length: 256 }, (_, byte) => byte).filter(byte => step(state, byte) !== undefined)
    if (state.end && (next.length === 0 || bytes.length > 400 || below(3) === 0)) return Buffer.from(bytes).toString()
    const late = next.filter(byte => !' \n{[,'.includes(String.fromCharCode(byte)))
    const last = closing.find(byte => next.includes(byte))
    const byte = last !== undefined && below(bytes.length > 300 ? 2 : 12) === 0 ? last : (bytes.length > 300 && late.length > 0 ? late[below(late.length)] : next[below(next.length)]) as number
    bytes.push(byte)
    state = step(state, byte) as State
  }
  throw new Error(`no end: ${Buffer.from(bytes).toString().slice(0, 200)}`)
}

function randomSchema (below: Below, depth = 0): unknown {
  const name = (): string => ['a', 'ab', 'b', 'née', 'with "quotes"', 'constructor', 'x y', ''][below(8)] as string
  const simple: Array<() => object> = [
    () => ({ type: 'string', ...below(2) === 0 ? { minLength: below(3), maxLength: 3 + below(4) } : {} }),
    () => ({ type: 'string', format: ['date', 'date-time', 'uuid', 'time'][below(4)] }),
    () => ({ type: 'integer', ...below(2) === 0 ? { minimum: below(2000) - 1000, maximum: 1000 + below(5000) } : {} }),
    () => ({ type: 'integer', exclusiveMinimum: below(50) - 30, exclusiveMaximum: 30 + below(50) }),
    () => ({ type: 'number', ...below(2) === 0 ? { minimum: below(9) - 20, maximum: below(30) } : {} }),
    () => ({ type: ['boolean', 'null'], title: 'a title' }),
    () => ({ enum: ['a', 'ab', 1, null, true, 'née', 1.5] }),
    () => ({ const: 'only "this"' }),
    () => ({}),
    () => ({ $ref: '#/$defs/leaf' })
  ]
  const nested: Array<() => object> = [
    () => {
      const properties = Object.fromEntries(Array.from({ length: below(5) }, () => [name(), randomSchema(below, depth + 1)]))
      const required = [...Object.keys(properties).filter(() => below(2) === 0), ...below(6) === 0 ? ['more'] : []]
      return { type: 'object', properties, required, ...[{}, { additionalProperties: false }, { additionalProperties: true }, { additionalProperties: { type: 'integer' } }][below(4)] }
    },
    () => ({ type: 'array', items: randomSchema(below, depth + 1), minItems: below(3), maxItems: 3 + below(3) }),
    () => ({ type: 'array', prefixItems: [randomSchema(below, depth + 1), randomSchema(below, depth + 1)], items: false }),
    () => ({ anyOf: Array.from({ length: 1 + below(3) }, () => randomSchema(below, depth + 1)) }),
    () => ({ type: 'object', properties: { next: { anyOf: [{ $ref: '#' }, { type: 'null' }] } }, required: ['next'], additionalProperties: false })
  ]
  const kinds = depth > 2 ? simple : [...simple, ...nested, ...nested]
  return kinds[below(kinds.length)]!()
}

function refusal (schema: unknown): { code: string, param: string | undefined, message: string } | undefined {
  try {
    schemaNode(schema, 'schema')
    return undefined
  } catch (err) {
    if (!EngineError.is(err)) throw err
    return { code: err.code, param: err.param, message: err.message }
  }
}

t.test('whatever a schema lets through is JSON and valid under it', t => {
  const below = seeded(20)
  for (let i = 0; i < 300; i++) {
    const schema = { ...randomSchema(below) as object, $defs: { leaf: { type: 'string', maxLength: 3 } } }
    // Some require what they forbid.
    if (refusal(schema)?.code === 'invalid_request') continue
    const node = schemaNode(schema, 'schema')
    const validate = ajv.compile(schema)
    for (let n = 0; n < 3; n++) {
      const text = writeText(node, below)
      if (!validate(JSON.parse(text))) return t.fail(`${JSON.stringify(schema)} lets through ${text}: ${ajv.errorsText(validate.errors)}`)
    }
  }
  t.end()
})

t.test('JSON as models and JSON.stringify write it is let through', t => {
  const value = { 'a "b"': [1, -0.5, 1e-7, true, null, [], {}], née: { deep: [[[{ x: '\u0001 \\ \u{1f600}' }]]] } }
  for (const text of [JSON.stringify(value), JSON.stringify(value, undefined, 2), JSON.stringify(value, undefined, 4), '{"a": 1, "b": 2}']) t.ok(accepts(ANY_OBJECT, text), text)
  for (const text of ['{', '{"a":01}', '{"a":1,}', '[1]', '{"a":"\n"}', '{a:1}', '{"a":.5}', '{}x', '{"a":"\\x"}']) t.notOk(accepts(ANY_OBJECT, text), text)
  t.end()
})

t.test('other members have other names', t => {
  const node = schemaNode({ type: 'object', properties: { né: {}, ab: {} }, additionalProperties: { type: 'integer' } }, 'schema')
  for (const text of ['{"n":1}', '{"néé":1}', '{"a":1}', '{"abc":1}', '{"":1}', '{"ab":"x","abc":1}']) t.ok(accepts(node, text), text)
  for (const text of ['{"ab":1,"ab":2}', '{"abc":"x"}', '{"a\\u0062":1}', '{"x":1,"ab":"y"}']) t.notOk(accepts(node, text), text)
  t.end()
})

t.test('a member may have any name', t => {
  const node = schemaNode(JSON.parse('{"type":"object","properties":{"__proto__":{"const":1},"constructor":{"const":2}},"required":["__proto__","toString"],"additionalProperties":{"const":3}}'), 'schema')
  t.ok(accepts(node, '{"__proto__":1,"constructor":2,"toString":3,"valueOf":3}'))
  for (const text of ['{"constructor":2,"toString":3}', '{"__proto__":3,"toString":3}', '{"__proto__":1,"toString":1}']) t.notOk(accepts(node, text), text)
  t.end()
})

t.test('integers within bounds, and no others', t => {
  for (const [minimum, maximum] of [[0, 0], [-5, 5], [9, 11], [-1234, -99], [98, 10_203], [-1, 0], [1000, 1000], [-7, 1000]] as const) {
    const node = schemaNode({ type: 'integer', minimum, maximum }, 'schema')
    for (let i = minimum - 30; i <= Math.min(maximum, minimum + 12_000) + 30; i++) if (accepts(node, String(i)) !== (i >= minimum && i <= maximum)) return t.fail(`${i} of ${minimum} to ${maximum}`)
  }
  t.end()
})

t.test('a keyword that can\'t be kept is refused by name, with its place', t => {
  for (const [keyword, value] of Object.entries({ pattern: '(a|aa)+$', not: {}, oneOf: [{}], multipleOf: 2, if: {}, patternProperties: {}, minProperties: 1, uniqueItems: true, contains: {}, propertyNames: {}, dependentRequired: {}, unevaluatedProperties: false, ['__proto__']: 1, invented: 1 })) {
    t.match(refusal({ type: 'object', properties: { a: { [keyword]: value } } }), { code: 'unsupported', param: `schema.properties.a.${keyword}`, message: new RegExp(`"${keyword}"`) }, keyword)
  }
  t.match(refusal({ type: 'string', format: 'email' }), { code: 'unsupported', param: 'schema.format' })
  t.match(refusal({ anyOf: [{}], properties: {} }), { code: 'unsupported', param: 'schema.anyOf' })
  t.match(refusal({ type: 'number', exclusiveMinimum: 0 }), { code: 'unsupported', param: 'schema.exclusiveMinimum' })
  t.match(refusal({ $ref: 'http://localhost/x' }), { code: 'unsupported', param: 'schema.$ref' })
  t.end()
})

t.test('schemas that are wrong, endless or too large are refused at once', t => {
  let deep: unknown = { type: 'string' }
  for (let i = 0; i < 50_000; i++) deep = { type: 'array', items: deep }
  let wide: unknown = { type: 'string' }
  for (let i = 0; i < 40; i++) wide = { type: 'object', properties: { a: wide, b: wide } }
  const cases: Record<string, unknown> = {
    deep,
    'refers to itself': { $ref: '#' },
    'refers to itself by others': { anyOf: [{ $ref: '#/$defs/a' }], $defs: { a: { anyOf: [{ type: 'null' }, { $ref: '#/$defs/b' }] }, b: { allOf: [{ $ref: '#/$defs/a' }] } } },
    'a reference to nowhere': { $ref: '#/$defs/__proto__' },
    'to a prototype': { $ref: '#/constructor/prototype' },
    'of no type': { type: 'invented' },
    'a list as schema': { properties: { a: [] } },
    'many values': { enum: Array.from({ length: 20_000 }, (_, i) => `value ${i}`) },
    'long values': { enum: ['x'.repeat(1_000_000)] },
    'many properties': { type: 'object', properties: Object.fromEntries(Array.from({ length: 20_000 }, (_, i) => [`p${i}`, {}])) },
    'many optional': { type: 'object', properties: Object.fromEntries(Array.from({ length: 200 }, (_, i) => [`p${i}`, { const: 1 }])) },
    'nothing between': { type: 'integer', minimum: 5, maximum: 4 },
    'no text': { minLength: 5, maxLength: 2 },
    'a negative count': { type: 'array', minItems: -1 },
    false: false,
    'a text': 'string',
    'nothing of the type': { type: 'integer', enum: ['a'] }
  }
  const begun = performance.now()
  for (const [name, schema] of Object.entries(cases)) t.match(refusal(schema), { code: /^(invalid_request|unsupported)$/, param: /^schema/ }, name)
  t.equal(refusal(wide), undefined, 'the same object in many places counts once')
  t.comment(`${(performance.now() - begun).toFixed(0)} ms`)
  t.end()
})

t.test('masks', async t => {
  const texts = ['{', '}', '"', '{"', 'a', 'ab', 'é', '\u00c3', ' ', '\n', ':', ',', '1', '12', 'null', '"}', 'special', '{"a', '\ud83d']
  const bytes = texts.map((text, i) => i === 7 ? Uint8Array.of(0xc3) : Buffer.from(text))
  const tokenizer = { bytes: (id: number) => bytes[id] ?? new Uint8Array(0), isSpecial: (id: number) => id === 16 }
  const vocabulary = await Vocabulary.of(tokenizer, 40)
  const allowed = (mask: Uint32Array): number[] => Array.from({ length: 40 }, (_, id) => id).filter(id => (mask[id >>> 5]! >>> (id & 31) & 1) === 1)
  const maskOf = async (node: Node, text: string): Promise<number[]> => {
    const constraint = await new Promise<ReturnType<Grammar['constrain']>>(resolve => {
      const grammar = new Grammar(node, { vocabulary, tokenizer, eosIds: [39] })
      const made = grammar.constrain(() => { resolve(made) })
      if (made.mask !== undefined) resolve(made)
    })
    for (const token of [...text].map(one => texts.indexOf(one))) {
      constraint.accept(token)
      while (constraint.mask === undefined && !constraint.complete) await new Promise(resolve => { setImmediate(resolve) })
    }
    return constraint.mask === undefined ? [] : allowed(constraint.mask)
  }

  await t.test('have a bit for each token that may come next, for none that is special, and for the end where it may be', async t => {
    const node = schemaNode({ type: 'object', properties: { a: {} }, required: ['a'] }, 'schema')
    t.same(await maskOf(node, ''), [0, 3, 17])
    t.same(await maskOf(node, '{'), [2, 8, 9])
    t.same(await maskOf(schemaNode({ type: 'integer' }, 'schema'), '1'), [12, 13, 39])
    // Half a character may begin in one token and end in the next.
    t.ok((await maskOf(schemaNode({ type: 'string' }, 'schema'), '"')).includes(7))
    t.notOk((await maskOf(schemaNode({ type: 'string' }, 'schema'), '"')).includes(16))
  })

  await t.test('agree with reading each token by itself', async t => {
    const below = seeded(7)
    for (let i = 0; i < 60; i++) {
      const node = schemaNode({ ...randomSchema(below) as object, $defs: { leaf: { type: 'string', maxLength: 3 } } }, 'schema')
      let state = begin(node)
      for (const byte of Buffer.from(writeText(node, below)).subarray(0, below(30))) state = step(state, byte) as State
      const work = vocabulary.maskOf(state)
      let result = work.next()
      while (result.done !== true) result = work.next()
      const alone = texts.map((_, id) => id).filter(id => id !== 16 && [...bytes[id]!].reduce<State | undefined>((at, byte) => at === undefined ? undefined : step(at, byte), state) !== undefined)
      t.same(allowed(result.value), alone, keyOf(state).slice(0, 80))
    }
  })
})

t.test('a schema with more and more ways to read the same text is read in a bounded number of them', t => {
  const both = (name: string): object => ({ type: 'object', properties: { x: { anyOf: [{ $ref: '#' }, { type: 'null' }] }, [name]: { type: 'integer' } }, required: ['x', name], additionalProperties: false })
  let state = begin(schemaNode({ anyOf: [both('p'), both('q')] }, 'schema'))
  for (const byte of Buffer.from('{"x":'.repeat(40))) {
    state = step(state, byte) as State
    t.ok(state.rests.length <= 128)
  }
  t.end()
})
