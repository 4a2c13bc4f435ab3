import t from 'tap'
import { severalPrompts } from '../../plugin/planning/prompts.ts'

/** By what it means. */
function parsed (json: string): boolean {
  const value: unknown = JSON.parse(json)
  return Array.isArray(value) && value.length > 1 && typeof value[0] !== 'number'
}

t.test('one prompt or several is recognised without parsing', async t => {
  for (const json of [
    '"a"', '""', '"[1,2]"', 'null', '7', '{"a":[1,2]}', '[]', '[ ]', '[1]', '[1,2,3]', '[ -1, 2]', '["a"]', '[ "a" ]', '["a","b"]', '["a" , "b"]', '["a,b"]', '["\\"",","]', '["\\\\","b"]', '["\\\\"]',
    '["\\",\\""]', '["]"]', '["]","["]', '[[1,2]]', '[[1,2],[3]]', '[[],[]]', '[ [ 1 ] , [ 2 ] ]', '[[1]\n]', '[null,1]', '[{},{}]', '[true,"a"]', '["ä","ö"]'
  ]) t.equal(severalPrompts(Buffer.from(json)), parsed(json), json)
})

t.test('of megabytes, too', async t => {
  const ids = Array.from({ length: 1_000_000 }, (_, i) => i)
  t.equal(severalPrompts(Buffer.from(JSON.stringify(ids))), false)
  t.equal(severalPrompts(Buffer.from(JSON.stringify([ids]))), false)
  t.equal(severalPrompts(Buffer.from(JSON.stringify([ids, [1]]))), true)
  t.equal(severalPrompts(Buffer.from(JSON.stringify(['\\"'.repeat(1_000_000)]))), false)
  t.equal(severalPrompts(Buffer.from(JSON.stringify(['\\"'.repeat(1_000_000), 'b']))), true)
})
