import { readFileSync } from 'node:fs'
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import t from 'tap'
import ts from 'typescript'
import { adapters, checkAdapter, type Adapter } from '../../adapters/index.ts'
import { packageRoot } from '../helper/package-root.ts'
import { Registry } from '../../plugin/registry/index.ts'
import { bodyFrom, callWith, dispatcherFor, silent, textOf } from '../helper/adapter-call.ts'

const page = readFileSync(join(packageRoot(), 'docs', 'adapters.md'), 'utf8')

/** The adapter of the page, compiled and loaded as it stands there. */
async function acmeOfThePage (): Promise<Adapter> {
  const block = /```ts\n(.*?)```/s.exec(page)?.[1] ?? ''
  const local = block.replace("'fastify-epd/adapters'", JSON.stringify(new URL('../../adapters/index.js', import.meta.url).href))
  const { outputText } = ts.transpileModule(local, { compilerOptions: { module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2023 } })
  const module = await import(`data:text/javascript,${encodeURIComponent(outputText)}`) as { acme: Adapter }
  return module.acme
}

t.test('the adapter that the page builds encodes, generates and releases, and the registry links its nodes', async t => {
  const seen: Array<[string, string]> = []
  const server = createServer((request, response) => {
    const chunks: Buffer[] = []
    request.on('data', (chunk: Buffer) => chunks.push(chunk))
    request.on('end', () => {
      const body = Buffer.concat(chunks).toString()
      seen.push([`${request.method} ${request.url}`, body])
      if (request.url === '/embed') response.end('{"handles":[{"id":"h1","tokens":3,"hit":false}]}')
      else if (request.url === '/status') response.end('{"model":"m","boot":7}')
      else response.writeHead(body.includes('expired') ? 410 : 200, { 'content-type': 'application/json' }).end('{"choices":[{"ok":true}]}')
    })
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const [e, lm] = [`http://127.0.0.1:${port}`, `http://localhost:${port}`]

  const acme = await acmeOfThePage()
  checkAdapter(acme)
  const dispatcher = dispatcherFor(t)
  const registry = new Registry({ dispatcher, log: silent, adapters: [acme] })
  t.teardown(async () => { await registry.close() })
  registry.add({ url: e, role: 'encoder', adapter: 'acme' })
  registry.add({ url: lm, role: 'hybrid', adapter: 'acme' })
  await registry.waitFor(snapshot => snapshot.link(e, lm) === 'linked')

  const call = callWith(dispatcher)
  const node = registry.get(e)!
  const consumer = registry.get(lm)!
  const body = await bodyFrom({ model: 'm', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'data:image/png;base64,AAAA' } }] }] })
  const features = await acme.encode({ node, consumer, items: body.media, body }, call)
  t.match(features, [{ item: 0, lease: 'h1', tokens: 3 }])
  t.equal(await textOf(await acme.generate({ node: consumer, path: '/v1/chat/completions', body, features }, call)), '{"choices":[{"ok":true}]}')
  t.match(JSON.parse(seen.at(-1)![1]), { acme_handles: ['h1'], messages: [{ content: [{ image_url: { url: 'acme:h1' } }] }] })
  const expired = await bodyFrom({ model: 'expired', messages: [] })
  await t.rejects(acme.generate({ node: consumer, path: '/v1/chat/completions', body: expired, features: [] }, call), { code: 'FEATURES_GONE' })
  await acme.release([{ node, lease: 'h1', wire: 'h1' }], call)
  t.equal(seen.at(-1)![0], 'DELETE /embed/h1')
  await acme.abort(node, 'x', call)
  await t.rejects(acme.prefill({ node, decode: node, body, features: [] }, call), { code: 'REFUSED' })
})

t.test('the page names every shipped adapter', async t => {
  for (const name of adapters.keys()) t.match(page, `| \`${name}\` |`)
})
