/** `npm test`: what goes wrong in one of several files that share a process. */
import { spawnSync } from 'node:child_process'
import { join, relative } from 'node:path'
import t from 'tap'
import { nodeCommand } from '../helper/node-command.ts'
import { packageRoot } from '../helper/package-root.ts'

const RUNNER = join(packageRoot(), 'dist', 'test', 'helper', 'run.js')
const GOOD = "import t from 'tap'\nt.test('good', async t => { t.ok(t.testdir({ a: '' })) })\n"

const run = (...files: string[]): { status: number | null, stdout: string } => {
  const command = nodeCommand([RUNNER, ...files.map(file => relative(packageRoot(), file))])
  return spawnSync(command.file, command.args, { cwd: packageRoot(), encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
}

for (const [what, source, words] of [
  ['an assertion that fails', "t.test('bad', async t => { t.equal(1, 2, 'one is two') })", 'b.test.js > bad > one is two'],
  ['an error at its top', "throw new Error('at the top')", 'b.test.js > at the top'],
  ['a process that ends', 'process.exit(0)', 'b.test.js > test unfinished'],
  ['a process that is killed', "process.kill(process.pid, 'SIGKILL')", 'signal: SIGKILL']
] as const) {
  t.test(`${what} is a failure of its file`, async t => {
    const dir = t.testdir({ body: { 'a.test.js': GOOD, 'b.test.js': `import t from 'tap'\n${source}\n`, 'c.test.js': GOOD } })
    const { status, stdout } = run(...['a', 'b', 'c'].map(name => join(dir, 'body', `${name}.test.js`)))
    t.equal(status, 1)
    const dead = what.includes('process')
    t.match(stdout, /^ok .*a\.test\.js {2}1 passed, 0 failed/m)
    t.match(stdout, /^FAILED .*b\.test\.js/m)
    t.match(stdout, dead ? /^FAILED .*c\.test\.js/m : /^ok .*c\.test\.js {2}1 passed, 0 failed/m, dead ? 'what had not run has not passed' : 'the next one runs')
    t.match(stdout, words)
    t.match(stdout, new RegExp(`\\n${dead ? 1 : 2} passed, ${dead ? 2 : 1} failed\\n$`))
  })
}
