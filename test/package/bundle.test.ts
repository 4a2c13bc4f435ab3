/** A gateway bundled by esbuild into one file starts where neither the package nor its files are. */
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { build } from 'esbuild'
import t from 'tap'
import { installLight } from '../helper/install.ts'

const GATEWAY = `
import Fastify from 'fastify'
import epd from 'fastify-epd'
const app = Fastify()
await app.register(epd, { nodes: [{ url: 'http://127.0.0.1:9', role: 'hybrid', adapter: 'openai', models: ['m'] }] })
const url = await app.listen({ port: 0, host: '127.0.0.1' })
const chat = await fetch(url + '/v1/chat/completions', { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{"model":"m","messages":[]}' })
console.log('chat', chat.status, (await chat.json()).error.code)
for (const path of ['/health', '/metrics', '/nodes/status', '/epd/traces']) console.log(path, (await fetch(url + path)).status)
await app.close()
`

t.test('it answers', async t => {
  const { dir } = await installLight(t)
  const empty = t.testdir()
  const outfile = join(empty, 'gateway.mjs')
  await build({
    stdin: { contents: GATEWAY, resolveDir: dir, loader: 'js' },
    bundle: true,
    platform: 'node',
    format: 'esm',
    outfile,
    logLevel: 'error',
    // Dependencies that are CommonJS need a require().
    banner: { js: "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url)" }
  })
  const gateway = spawnSync(process.execPath, [outfile], { cwd: empty, encoding: 'utf8' })
  t.equal(gateway.stderr, '')
  t.same(gateway.stdout.trim().split('\n'), ['chat 503 no_healthy_node', '/health 503', '/metrics 200', '/nodes/status 200', '/epd/traces 200'])
})
