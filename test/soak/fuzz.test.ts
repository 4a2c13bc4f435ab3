import t from 'tap'
import { fuzz } from './fuzz.ts'

// The long form: `npm run fuzz`.
t.test('forged frames and mutated encoder results leave the engines healthy, all blocks free or cached', async t => {
  const { refused, answers, problems } = await fuzz({ frames: 2_000, results: 80, seed: 18 })
  t.same(problems, [])
  t.ok(refused.malformed! > 500, JSON.stringify(refused))
  t.equal(Object.values(answers).reduce((sum, n) => sum + n, 0), 80, JSON.stringify(answers))
  t.notOk(answers.internal, 'none is taken for the engine\'s own fault')
})
