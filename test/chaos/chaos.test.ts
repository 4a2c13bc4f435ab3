/** The long run of `npm run chaos`, in `npm run test:full` only; and the garbage that it uses. */
import t from 'tap'
import { chaos } from './chaos.ts'
import { SPOIL, SPOIL_RESULT } from './garbage.ts'

t.test('each kind of garbage differs from the answer that it spoils', t => {
  const answer = { encoder_result: [{ lease: 'a', remote_block_ids: [1, 2] }] }
  const type = 'application/json; charset=utf-8'
  for (const [name, spoil] of Object.entries({ ...SPOIL, ...SPOIL_RESULT })) {
    const spoilt = spoil(type, Buffer.from(JSON.stringify(answer)))
    t.ok(spoilt.type !== type || String(spoilt.body) !== JSON.stringify(answer), name)
    if (name in SPOIL_RESULT) t.ok('encoder_result' in JSON.parse(String(spoilt.body)), `${name} is JSON`)
  }
  t.end()
})

if (process.env.EPD_TEST_FULL === '1') {
  t.test('1,000 requests while nodes are killed, stopped, reset and answer garbage', { timeout: 900_000 }, async t => {
    const { outcomes, errors, problems } = await chaos(t, { requests: 1_000, seed: 17 })
    t.same(problems, [], JSON.stringify(outcomes))
    t.comment(errors.join('\n'))
  })
}
