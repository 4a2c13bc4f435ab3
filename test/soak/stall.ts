/**
 * The longest stall of an engine's event loop under large bodies: `npm run stall`, or `npm run stall -- calls` for the bodies of that name. Each body is sent by another
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
const form = (schema: string, n = 1): string => `{"messages":[{"role":"user","content":"a"}],"max_tokens":40,"temperature":2,"n":${n},"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":${schema}}}}`
/** Each level can be read in twice as many ways as the one around it. */
const WAYS = { anyOf: ['p', 'q'].map(name => ({ type: 'object', properties: { x: { anyOf: [{ $ref: '#' }, { $ref: '#' }, { type: 'string' }] }, [name]: { type: 'integer' } }, required: ['x', name] })) }
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
    'a schema 5,000 deep': form(`${'{"type":"array","items":'.repeat(5_000)}{}${'}'.repeat(5_000)}`),
    'a schema of 30,000 properties': form(`{"type":"object","properties":{${Array.from({ length: 30_000 }, (_, i) => `"p${i}":{}`).join()}}}`),
    'a schema of 1,000 values': form(JSON.stringify({ enum: Array.from({ length: 1_000 }, (_, i) => `value ${i}`) })),
    '99 optional properties': form(JSON.stringify({ type: 'object', properties: Object.fromEntries(Array.from({ length: 99 }, (_, i) => [`p${i}`, { type: 'string' }])) }), 16),
    'one enum of 60 MiB': fill(form('{"enum":["|"]}').split('|')[0] as string, 'a', form('{"enum":["|"]}').split('|')[1] as string),
    'a schema with many ways': form(JSON.stringify(WAYS), 16),
    'any object, 128 times': '{"messages":[{"role":"user","content":"a"}],"max_tokens":20,"temperature":2,"n":128,"response_format":{"type":"json_object"}}',
    'tools 5,000 deep': `{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"__proto__","parameters":${'{"a":'.repeat(5_000)}1${'}'.repeat(5_000)}}}]}`,
    'calls of 60 MiB': fill('{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{\\"a\\":[', '1,', '1]}"}}]}]}'),
    '30,000 calls': `{"messages":[${Array.from({ length: 300 }, () => `{"role":"assistant","tool_calls":[${'{"function":{"name":"f"}},'.repeat(99)}{"function":{"name":"f"}}]}`).join()}]}`,
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
  const [only] = process.argv.slice(2)
  for (const name of ['1,300 messages', ...names].filter(name => only === undefined || name.includes(only))) {
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
