/**
 * `npm test [-- FILE ...]`: runs the test files, each in a process of its own, four at a time. tap's own runner, which
 * `npm run coverage` needs, loads a hook for coverage into every process and thread that a test starts, which costs each
 * as much as a start of Node.js.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync } from 'node:fs'
import { join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { nodeArgs } from './node-command.ts'
import { packageRoot } from './package-root.ts'
import Reporter from './reporter.ts'

const JOBS = 4
const SECONDS = process.env.EPD_TEST_FULL === '1' ? 1_200 : 300
/** These take longest: at the end they would run alone. */
const FIRST = /\/(ui|chaos|package|deploy|vllm-house)\b/

const folder = fileURLToPath(new URL('..', import.meta.url))

function filesOf (args: readonly string[]): string[] {
  if (args.length > 0) return args.map(arg => arg.replace(/^(\.\/)?test\//, 'dist/test/').replace(/\.ts$/, '.js'))
  const all = readdirSync(folder, { recursive: true, encoding: 'utf8' }).filter(name => name.endsWith('.test.js')).map(name => relative(packageRoot(), join(folder, name))).sort()
  return [...all.filter(file => FIRST.test(file)), ...all.filter(file => !FIRST.test(file))]
}

/** What the file says, as a subtest of the whole run. */
async function run (file: string, number: number): Promise<{ readonly ok: boolean, readonly tap: string }> {
  const start = performance.now()
  const child = spawn(process.execPath, [...nodeArgs, file], { cwd: packageRoot(), stdio: ['ignore', 'pipe', 'inherit'], env: { ...process.env, TAP: '1', TAP_TIMEOUT: String(SECONDS) } })
  // A test that is late ends itself, unless it never comes to that.
  const timer = setTimeout(() => { child.kill('SIGKILL') }, (SECONDS + 20) * 1_000)
  let tap = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => { tap += text })
  const [code, signal] = await once(child, 'close') as [number | null, NodeJS.Signals | null]
  clearTimeout(timer)
  const ok = code === 0
  const why = ok ? '' : `  ---\n  exitCode: ${code}\n  signal: ${signal}\n  ...\n`
  return { ok, tap: `# Subtest: ${file}\n${tap.replace(/^(?=.)/gm, '    ')}\n${ok ? 'ok' : 'not ok'} ${number} - ${file} # time=${Math.round(performance.now() - start)}ms\n${why}` }
}

const files = filesOf(process.argv.slice(2))
const reporter = new Reporter()
reporter.pipe(process.stdout)
reporter.write(`TAP version 14\n1..${files.length}\n`)
const waiting = [...files]
await Promise.all(Array.from({ length: JOBS }, async () => {
  for (let file = waiting.shift(); file !== undefined; file = waiting.shift()) {
    const { ok, tap } = await run(file, files.indexOf(file) + 1)
    if (!ok) process.exitCode = 1
    reporter.write(tap)
  }
}))
reporter.end()
