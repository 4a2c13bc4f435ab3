import { isDeepStrictEqual } from 'node:util'
import t from 'tap'
import { parseBody } from '../../engines/server/json-body.ts'
import { seeded } from '../helper/random.ts'

const parse = (text: string): unknown => JSON.parse(text)
const parsed = async (value: unknown): Promise<unknown> => await parseBody(Buffer.from(JSON.stringify(value)), parse)

t.test('what is parsed in slices equals what JSON.parse makes of it', async t => {
  const padding = 'x'.repeat(300_000)
  const hard = [
    'A'.repeat(40_000), '\\'.repeat(40_001), '"'.repeat(50_000), 'é'.repeat(40_000), '𝄞'.repeat(700_000), '\n\t'.repeat(40_000), '\\"'.repeat(600_000),
    '\u0000\u001f'.repeat(300_000), '\ud83d'.repeat(33_000), 'a'.repeat(32_767), 'a'.repeat(32_768), '', '{"x":[1,2]}'.repeat(9_000)
  ]
  for (const text of hard) {
    const value = { padding, text, deep: [{ text }, text], last: 1 }
    t.ok(isDeepStrictEqual(await parsed(value), value), JSON.stringify(text.slice(0, 4)))
  }
  const below = seeded(18)
  const alphabet = ['a', '"', '\\', '\n', 'é', '𝄞', '\u2028', '/', '{', '[', ',']
  for (let round = 0; round < 40; round++) {
    const make = (): string => Array.from({ length: below(60_000) }, () => alphabet[below(alphabet.length)]).join('')
    const value = { padding, list: [make(), make(), { [make().slice(0, 20)]: make() }] }
    if (!isDeepStrictEqual(await parsed(value), value)) t.fail(`round ${round}`)
  }
  const nested = 'x'.repeat(300_000)
  let value = await parseBody(Buffer.from('['.repeat(50_000) + JSON.stringify(nested) + ']'.repeat(50_000)), parse)
  while (Array.isArray(value)) value = value[0] as unknown
  t.equal(value, nested, 'nested deeper than calls may be')
})

t.test('a broken body is refused as JSON.parse refuses it', async t => {
  const padding = 'x'.repeat(300_000)
  for (const text of [`{"a":"${padding}`, `{"a":"${padding}\\`, `{"a":"${padding}"`, `{"a":"${padding}" "b"}`, `["${padding}\\q"]`, `[${'"\\""'.repeat(100_000)}]`, `${padding}`]) {
    await t.rejects(parseBody(Buffer.from(text), parse), SyntaxError)
  }
})

t.test('a body of more values or more short text than any request needs is refused before it is parsed', async t => {
  const never = (): never => t.fail('parsed') as never
  const bodies: Record<string, string> = {
    messages: `{"messages":[${'{"role":"user","content":"a"},'.repeat(100_000)}]}`,
    parts: `{"messages":[{"role":"user","content":[${'{"type":"text","text":"a"},'.repeat(1_000_000)}]}]}`,
    numbers: `[${'1,'.repeat(3_000_000)}1]`,
    nesting: '['.repeat(2_000_000),
    text: `[${`"${'y'.repeat(30_000)}",`.repeat(500)}"y"]`,
    spaces: ' '.repeat(20_000_000)
  }
  for (const [name, body] of Object.entries(bodies)) await t.rejects(parseBody(Buffer.from(body), never), { code: 'request_too_large' }, name)
})

t.test('other work gets its turn while a large body is read', async t => {
  const shapes = ['\\"', 'a', '\\\\', 'é', '\\n'].map(unit => unit.repeat(Math.floor((8 << 20) / Buffer.byteLength(unit))))
  for (const text of shapes) {
    let turns = 0
    let timer = setImmediate(function turn () { turns++; timer = setImmediate(turn) })
    await parseBody(Buffer.from(`{"text":"${text}"}`), parse)
    clearImmediate(timer)
    t.ok(turns >= (text.startsWith('a') ? 1 : 8), `${JSON.stringify(text.slice(0, 2))}: ${turns} turns`)
  }
})
