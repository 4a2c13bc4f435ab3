/**
 * `npm run walk`: which files one text request crosses, from its POST to the last byte. Asks V8 which functions ran
 * during a request (after a first one, so that what is made once does not count) and lists their source files.
 *
 * @see https://chromedevtools.github.io/devtools-protocol/v8/Profiler/#method-startPreciseCoverage
 */
import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { Session } from 'node:inspector/promises'
import { join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import Fastify from 'fastify'
import epd from '../../plugin/index.ts'
import { until } from '../helper/until.ts'

const MODEL = 'm'
const ANSWER = JSON.stringify({ id: 'c', object: 'chat.completion', created: 1, model: MODEL, choices: [{ index: 0, message: { role: 'assistant', content: 'Hello' }, finish_reason: 'stop' }] })
const BUILD = fileURLToPath(new URL('../..', import.meta.url))

/** A model server that answers every POST with one whole completion. */
async function modelServer (): Promise<{ url: string, close (): void }> {
  const server = createServer((request, response) => {
    response.setHeader('content-type', 'application/json')
    if (request.method === 'GET') return response.end(JSON.stringify({ object: 'list', data: [{ id: MODEL, object: 'model' }] }))
    return request.resume().on('end', () => response.end(ANSWER))
  })
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as { port: number }
  return { url: `http://127.0.0.1:${port}`, close: () => { server.closeAllConnections(); server.close() } }
}

async function ask (url: string): Promise<void> {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ model: MODEL, messages: [{ role: 'user', content: 'Hello' }] })
  })
  if (response.status !== 200) throw new Error(`${response.status} ${await response.text()}`)
  await response.arrayBuffer()
}

/** Source files, relative to the package, with a function that ran since the last call. */
async function filesThatRan (session: Session): Promise<string[]> {
  const { result } = await session.post('Profiler.takePreciseCoverage')
  const ran = result.filter(({ url, functions }) => url.startsWith('file:') && functions.some(({ ranges }) => ranges[0]!.count > 0))
  return ran.map(({ url }) => relative(BUILD, fileURLToPath(url))).filter(file => /^(plugin|adapters|engines)\//.test(file)).map(file => file.replace(/\.js$/, '.ts')).sort()
}

const node = await modelServer()
const session = new Session()
session.connect()
await session.post('Profiler.enable')
await session.post('Profiler.startPreciseCoverage', { callCount: true, detailed: false })
const app = Fastify()
await app.register(epd, { nodes: [{ url: node.url, adapter: 'openai' }], embedded: false })
const url = await app.listen({ port: 0, host: '127.0.0.1' })
await until(() => app.epd.gateway.serves(MODEL), 'the node serves')
await ask(url)
await filesThatRan(session)
let files: string[] = []
// A probe, or another timer of the gateway, may run during a request: the least of a few counts.
for (let i = 0; i < 5; i++) {
  await ask(url)
  const ran = await filesThatRan(session)
  if (i === 0 || ran.length < files.length) files = ran
}

let lines = 0
for (const file of files) {
  const count = readFileSync(join(BUILD, '..', file), 'utf8').split('\n').length - 1
  lines += count
  console.log(`${String(count).padStart(6)}  ${file}`)
}
console.log(`${files.length} files, ${lines} lines`)
await app.close()
node.close()
session.disconnect()
