import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { createInterface } from 'node:readline'
import t from 'tap'
import { request } from 'undici'
import { startCli } from '../helper/cli.ts'
import { until } from '../helper/until.ts'

const MAIN = fileURLToPath(new URL('../../plugin/cli/main.js', import.meta.url))
const json = { 'content-type': 'application/json' }

/** A streamed answer of so many tokens, and the bytes that have come of it so far. */
async function stream (url: string, tokens: number): Promise<{ text: () => string, ended: Promise<unknown> }> {
  const body = JSON.stringify({ messages: [{ role: 'user', content: 'Tell me a story.' }], stream: true, stream_options: { include_usage: true }, ignore_eos: true, max_tokens: tokens })
  const answer = await request(url + '/v1/chat/completions', { method: 'POST', headers: json, body })
  let text = ''
  answer.body.setEncoding('utf8').on('data', (data: string) => { text += data })
  const ended = once(answer.body, 'end')
  await until(() => text.length > 0, 'it has begun')
  return { text: () => text, ended }
}

t.test('SIGTERM lets the request in flight finish, refuses new ones, and ends the process with 0', async t => {
  const engine = await startCli(t, ['engine', '--role', 'hybrid', '--no-vision', '--grace-seconds', '60', '--threads', '1'])
  t.equal((await request(engine.url + '/health')).statusCode, 200)
  const answer = await stream(engine.url, 800)
  const exit = engine.stop()
  const health = await until(async () => {
    const { statusCode, body } = await request(engine.url + '/health')
    const { status } = await body.json() as { status: string }
    return statusCode === 503 && status
  }, 'health has changed')
  t.equal(health, 'draining')
  t.notMatch(answer.text(), /\[DONE\]/, 'the request is still in flight')
  const late = await request(engine.url + '/v1/chat/completions', { method: 'POST', headers: json, body: JSON.stringify({ messages: [{ role: 'user', content: 'Hello' }] }) })
  t.match([late.statusCode, await late.body.json()], [503, { error: { code: 'draining' } }])
  t.equal(late.headers['retry-after'], '1')
  await answer.ended
  t.match(answer.text(), /"completion_tokens":800\b.*\n\ndata: \[DONE\]\n\n$/, 'it came whole')
  t.equal(await exit, 0)
})

t.test('what does not finish within the grace time gets an error event, and the process ends with 0 all the same', async t => {
  const engine = await startCli(t, ['engine', '--role', 'hybrid', '--no-vision', '--grace-seconds', '0', '--threads', '1'])
  const answer = await stream(engine.url, 3500)
  const exit = engine.stop()
  await answer.ended
  t.match(answer.text(), /data: \{"error":\{[^}]*"code":"cancelled"[^}]*\}\}\n\n$/)
  t.equal(await exit, 0)
})

t.test('with --exit-with-parent the engine ends when its stdin closes, and stdout holds the URL alone', async t => {
  const child = spawn(process.execPath, [MAIN, 'engine', '--role', 'encoder', '--exit-with-parent', '--log-level', 'silent'], { stdio: ['pipe', 'pipe', 'ignore'] })
  t.teardown(() => child.kill('SIGKILL'))
  const exited = once(child, 'exit')
  const lines: string[] = []
  const reader = createInterface({ input: child.stdout }).on('line', line => { lines.push(line) })
  await once(reader, 'line')
  child.stdin.end()
  t.strictSame(await exited, [0, null])
  t.match(lines, [/^listening on http:\/\/127\.0\.0\.1:\d+$/])
  t.equal(lines.length, 1)
})

t.test('a signal while the model loads ends the process too', async t => {
  const child = spawn(process.execPath, [MAIN, 'engine', '--role', 'encoder'], { stdio: ['ignore', 'ignore', 'pipe'] })
  t.teardown(() => child.kill('SIGKILL'))
  const exited = once(child, 'exit')
  await once(child.stderr, 'data')
  child.kill('SIGTERM')
  t.strictSame(await exited, [0, null])
})
