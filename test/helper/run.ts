/**
 * `npm test [-- FILE ...]`: runs the test files in processes of their own, four at a time; the files of most rooms share
 * one. tap's own runner, which `npm run coverage` needs, loads a hook for coverage into every process and thread that a
 * test starts, which costs each as much as a start of Node.js.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { nodeArgs } from './node-command.ts'
import { packageRoot } from './package-root.ts'
import Reporter from './reporter.ts'

const JOBS = 4
const SECONDS = process.env.EPD_TEST_FULL === '1' ? 1_200 : 300
/** These take longest: at the end they would run alone. */
const FIRST = /\/(ui|chaos|package|deploy)\//
/**
 * Rooms whose files run one after the other in one process (run-together.ts). Each costs a second of CPU time less than by
 * itself: the 11 files of pipeline/ take 15 s instead of 38 s.
 */
const TOGETHER = /\/(adapters|body|cache|cli|discovery|e2e|encoder|llm|models|pipeline|planning|plugin|registry|relay|runtime|server|service|sglang|simulate|soak|telemetry|traces|turbomind)\//

const folder = fileURLToPath(new URL('..', import.meta.url))

function filesOf (args: readonly string[]): string[] {
  if (args.length > 0) return args.map(arg => arg.replace(/^(\.\/)?test\//, 'dist/test/').replace(/\.ts$/, '.js'))
  return readdirSync(folder, { recursive: true, encoding: 'utf8' }).filter(name => name.endsWith('.test.js')).map(name => relative(packageRoot(), join(folder, name))).sort()
}

/** The files of each process: those that take long first. */
function jobsOf (files: readonly string[]): string[][] {
  const rooms = new Map<string, string[]>()
  for (const file of files) {
    const key = TOGETHER.test(file) ? dirname(file) : file
    rooms.set(key, [...rooms.get(key) ?? [], file])
  }
  const jobs = [...rooms.values()]
  const first = jobs.filter(([file]) => FIRST.test(file!))
  return [...first, ...jobs.filter(job => !first.includes(job)).sort((a, b) => b.length - a.length)]
}

interface Ran { readonly tap: string, readonly code: number | null, readonly signal: NodeJS.Signals | null, readonly ms: number }

async function run (files: readonly string[]): Promise<Ran> {
  const start = performance.now()
  const [script, env] = files.length === 1 ? [files[0]!, {}] : [join(folder, 'helper', 'run-together.js'), { EPD_TEST_FILES: files.join('\n') }]
  const seconds = SECONDS * files.length
  const child = spawn(process.execPath, [...nodeArgs, script], { cwd: packageRoot(), stdio: ['ignore', 'pipe', 'inherit'], env: { ...process.env, ...env, TAP: '1', TAP_TIMEOUT: String(seconds) } })
  // A test that is late ends itself, unless it never comes to that.
  const timer = setTimeout(() => { child.kill('SIGKILL') }, (seconds + 20) * 1_000)
  let tap = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => { tap += text })
  const [code, signal] = await once(child, 'close') as [number | null, NodeJS.Signals | null]
  clearTimeout(timer)
  return { tap, code, signal, ms: Math.round(performance.now() - start) }
}

/** A subtest of the outermost level: its lines, its result, and what is said of a failure. */
const SUBTEST = /^# Subtest: (.*)\n((?: {4}.*\n|\n)*)(not ok|ok) \d+ - .*?(# time=\S+)?\n( {2}---\n(?: {2}.*\n|\n)*? {2}\.\.\.\n)?/gm

/** What each file says, as a subtest of the whole run. */
function results (files: readonly string[], { tap, code, signal, ms }: Ran): Array<{ readonly ok: boolean, readonly name: string, readonly lines: string, readonly end: string }> {
  const why = `  ---\n  exitCode: ${code}\n  signal: ${signal}\n  ...\n`
  if (files.length === 1) return [{ ok: code === 0, name: files[0]!, lines: tap.replace(/^(?=.)/gm, '    '), end: `# time=${ms}ms\n${code === 0 ? '' : why}` }]
  const found = new Map([...tap.matchAll(SUBTEST)].map(([, name, lines, result, time = '', diagnosis = '']) => [name!, { ok: result === 'ok', lines: lines!, end: `${time}\n${diagnosis}` }]))
  const all = files.map(name => ({ name, ...found.get(name) ?? { ok: false, lines: '', end: `\n${why}` } }))
  // What fails beside the files, as a late rejection, is the last one's.
  if (code !== 0 && all.every(({ ok }) => ok)) all.push({ ...all.pop()!, ok: false, end: `\n${why}` })
  return all
}

const files = filesOf(process.argv.slice(2))
const reporter = new Reporter()
reporter.pipe(process.stdout)
reporter.write(`TAP version 14\n1..${files.length}\n`)
const waiting = jobsOf(files)
let number = 0
await Promise.all(Array.from({ length: JOBS }, async () => {
  for (let job = waiting.shift(); job !== undefined; job = waiting.shift()) {
    for (const { ok, name, lines, end } of results(job, await run(job))) {
      if (!ok) process.exitCode = 1
      reporter.write(`# Subtest: ${name}\n${lines}\n${ok ? 'ok' : 'not ok'} ${++number} - ${name} ${end}`)
    }
  }
}))
reporter.end()
