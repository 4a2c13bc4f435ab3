import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { createInterface } from 'node:readline'
import t from 'tap'
import { request } from 'undici'
import { startCli } from '../helper/cli.ts'

const MAIN = fileURLToPath(new URL('../../plugin/cli/main.js', import.meta.url))
/** A picture of one pixel. */
const PIXEL = 'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='

t.test('SIGTERM lets the request in flight finish and ends the process with 0', async t => {
  const engine = await startCli(t, ['engine', '--role', 'encoder', '--grace-seconds', '5', '--sharing', '2'])
  t.equal((await request(engine.url + '/health')).statusCode, 200)
  const answering = request(engine.url + '/v1/chat/completions', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: PIXEL } }] }] })
  })
  const answer = await answering
  const { encoder_result: [result] } = await answer.body.json() as any
  t.match(result, { remote_engine_id: engine.url, num_tokens: Number, lease: String })
  await (await request(engine.url + '/distserve/free_cache', { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ lease: result.lease }) })).body.dump()
  t.equal(await engine.stop(), 0)
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
