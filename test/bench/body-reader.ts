/** Reads one 10 MB body in a fresh process: `body-reader.js bytes|fastify`. The client is a process of its own. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import Fastify from 'fastify'
import { parseBody, readBody } from '../../plugin/body/index.ts'
import { memory, resetPeak } from './memory.ts'
import { serve } from './processes.ts'

const SIZE = 10_000_000
const LIMIT = 64 << 20
const WARM_UPS = 1000

/** Sends small bodies until the code is compiled (which takes memory as well), waits for a word, sends the big one. */
const CLIENT = `
const { request } = require('node:http')
const [port, framing, size] = process.argv.slice(1)
const post = bytes => new Promise((resolve, reject) => {
  const headers = { 'content-type': 'application/json', ...(framing === 'chunked' ? {} : { 'content-length': bytes.length }) }
  const req = request({ port, host: '127.0.0.1', method: 'POST', headers }, res => res.resume().on('end', resolve)).on('error', reject)
  for (let i = 0; i < bytes.length; i += 65536) req.write(bytes.subarray(i, i + 65536))
  req.end()
})
const body = length => Buffer.from(JSON.stringify({ model: 'm', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'data:image/png;base64,' + 'QUJD'.repeat(length / 4) } }] }] }))
const main = async () => {
  for (let i = 0; i < ${WARM_UPS}; i++) await post(body(2000))
  process.send('warm')
  await new Promise(resolve => process.once('message', resolve))
  await post(body(Number(size)))
  process.exit()
}
main()
`

const app = Fastify({ bodyLimit: LIMIT })
if (process.argv[2] === 'bytes') {
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('*', (_request, _payload, done) => done(null))
  app.post('/', async request => {
    const body = await parseBody(await readBody(request.raw, { limit: LIMIT }))
    return { bytes: body.bytes.length }
  })
} else app.post('/', async request => ({ bytes: Object.keys(request.body as object).length }))

async function read (framing: string): Promise<{ stallMs: number, peak: number }> {
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const client = spawn(process.execPath, ['-e', CLIENT, String(port), framing, String(SIZE)], { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] })
  await once(client, 'message')
  const delay = monitorEventLoopDelay({ resolution: 1 })
  delay.enable()
  delay.reset()
  const idle = memory('VmRSS')
  resetPeak()
  client.send('go')
  await once(client, 'exit')
  delay.disable()
  return { stallMs: delay.max / 1e6, peak: (memory('VmHWM') - idle) / SIZE }
}

serve({ read })
