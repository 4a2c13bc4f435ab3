/**
 * The longest stall of an engine's event loop under large bodies: `node dist/test/soak/stall.js`. Each body is sent by another
 * process; every line has the answer's status, the time it took, the longest delay of the event loop, and on Linux the most
 * CPU time between two of its turns, which other processes on the machine do not change. All in milliseconds.
 */
import { fork } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { fileURLToPath } from 'node:url'
import { request } from 'undici'
import { shippedModel, startEngine } from '../../engines/server/index.ts'
import { dataUrl, makeScene, renderScene, seededRandom } from '../helper/pictures.ts'

const MIB = 1 << 20
const LIMIT = 64 * MIB - 1024
const fill = (before: string, unit: string, after: string): string => before + unit.repeat(Math.floor((LIMIT - before.length - after.length) / Buffer.byteLength(unit))) + after
const chat = (content: string): string => `{"messages":[{"role":"user","content":${content}}],"max_tokens":1}`

async function bodies (): Promise<Record<string, string>> {
  const picture = dataUrl(await renderScene(makeScene(seededRandom(1))))
  const [before, after] = chat('"|"').split('|') as [string, string]
  return {
    '100,000 messages': `{"messages":[${'{"role":"user","content":"a"},'.repeat(99_999)}{"role":"user","content":"a"}],"max_tokens":1}`,
    '64 MiB of messages': fill('{"messages":[', '{"role":"user","content":"a"},', '{"role":"user","content":"a"}]}'),
    '1 M text parts': chat(`[${'{"type":"text","text":"a"},'.repeat(999_999)}{"type":"text","text":"a"}]`),
    '25,000 messages': `{"messages":[${'{"role":"user","content":"a"},'.repeat(24_999)}{"role":"user","content":"a"}]}`,
    '1,300 messages': `{"messages":[${'{"role":"user","content":"a"},'.repeat(1_299)}{"role":"user","content":"a"}],"max_tokens":1}`,
    'one text of 64 MiB': fill(before, 'a', after),
    'of escapes': fill(before, '\\"', after),
    'of unicode': fill(before, 'é', after),
    'of spaces': fill('', ' ', '1'),
    'of numbers': fill('[', '1,', '1]'),
    'of brackets': fill('', '[', ''),
    'of a backslash': fill('"', '\\\\', '"'),
    '400 KiB of spaces as text': chat(JSON.stringify(' '.repeat(400 << 10))),
    '60 KiB of words as text': chat(JSON.stringify('several words and more '.repeat(2_700))),
    '60 KiB of one word': chat(JSON.stringify('x'.repeat(60 << 10))),
    '64 pictures': chat(`[${Array.from({ length: 64 }, () => `{"type":"image_url","image_url":{"url":"${picture}"}}`).join()},{"type":"text","text":"a"}]`),
    'one picture of 64 MiB': fill('{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,', 'iVBORw0KGgo', '"}},{"type":"text","text":"a"}]}]}'),
    '64 pictures of 1 MiB': chat(`[${Array.from({ length: 63 }, () => `{"type":"image_url","image_url":{"url":"data:image/png;base64,${'iVBORw0KGgo'.repeat(95_000)}"}}`).join()},{"type":"text","text":"a"}]`)
  }
}

/** CPU time of the main thread, milliseconds; 0 where the system does not say. */
function cpuTime (): number {
  return existsSync('/proc/self/schedstat') ? Number(readFileSync('/proc/self/schedstat', 'utf8').split(' ', 1)[0]) / 1e6 : 0
}

/** Measures the CPU time between any two turns of the event loop until it is stopped; returns the most. */
function watchTurns (): () => number {
  let [last, most] = [cpuTime(), 0]
  let timer = setImmediate(function turn () {
    const now = cpuTime()
    most = Math.max(most, now - last)
    last = now
    timer = setImmediate(turn)
  })
  return () => {
    clearImmediate(timer)
    return most
  }
}

if (process.send !== undefined) {
  const [url = ''] = process.argv.slice(2)
  const all = await bodies()
  process.send(Object.keys(all))
  process.on('message', (name: string) => {
    const since = performance.now()
    request(url + '/v1/chat/completions', { method: 'POST', headers: { 'content-type': 'application/json' }, body: all[name] as string, headersTimeout: 0, bodyTimeout: 0 })
      .then(async ({ statusCode, body }) => { process.send?.({ statusCode, text: (await body.text()).slice(0, 100), ms: performance.now() - since }) }, (err: unknown) => { process.send?.({ statusCode: 0, text: String(err), ms: performance.now() - since }) })
  })
} else {
  const engine = await startEngine({ role: 'hybrid', backend: 'pytorch', modelDir: shippedModel(), host: '127.0.0.1', port: 0, device: 'cpu', threads: 1, vision: true, media: { allowPrivate: false, allowedDomains: [] } })
  const client = fork(fileURLToPath(import.meta.url), [engine.url])
  const [names] = await once(client, 'message') as [string[]]
  const delay = monitorEventLoopDelay({ resolution: 1 })
  let longest = 0
  for (const name of ['1,300 messages', ...names]) {
    delay.reset()
    delay.enable()
    const stop = watchTurns()
    client.send(name)
    const [{ statusCode, text, ms }] = await once(client, 'message') as [{ statusCode: number, text: string, ms: number }]
    delay.disable()
    const cpu = stop()
    longest = Math.max(longest, cpu)
    console.log(`${name.padEnd(26)} ${statusCode} ${ms.toFixed(0).padStart(6)} ms, delay ${(delay.max / 1e6).toFixed(0).padStart(4)} ms, CPU ${cpu.toFixed(0).padStart(4)} ms  ${statusCode === 200 ? '' : text}`)
  }
  console.log(`longest turn: ${longest.toFixed(0)} ms of CPU time`)
  client.kill()
  await engine.close()
}
