/** TypeScript 5.4 compiles a consumer against the declarations, libraries included, as node16 and as bundlers resolve them. */
import { spawnSync } from 'node:child_process'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import t from 'tap'
import { installLight, link } from '../helper/install.ts'
import { packageRoot } from '../helper/package-root.ts'

const CONSUMER = `
import Fastify from 'fastify'
import epd, { OptionsError, resolveOptions, type Epd, type EpdOptions, type Gateway, type Policy } from 'fastify-epd'
import type { Adapter } from 'fastify-epd/adapters'
import type { EngineOptions } from 'fastify-epd/engines'

declare const own: Adapter
declare const engine: EngineOptions
console.log(engine.role)
const policy: Policy = candidates => [...candidates].reverse()
const options: EpdOptions = {
  nodes: [{ url: 'http://10.0.0.5:23333', role: 'encoder', adapter: own.name }],
  adapters: [own],
  routing: { policy },
  tenant: request => request.headers['x-customer']?.toString()
}
const app = Fastify()
await app.register(epd, options)
app.post('/v1/chat/completions', { config: { epd: true } }, async (request, reply) => await app.epd.handle(request, reply, { overrides: { model: 'm' } }))
const decorated: Epd = app.epd
const gateway: Gateway = decorated.gateway
const milliseconds: number = gateway.options.timeouts.encode
try { resolveOptions({ retries: milliseconds }) } catch (err) { if (err instanceof OptionsError) console.log(err.problems.map(problem => problem.instancePath)) }
// @ts-expect-error the options are typed
await app.register(epd, { bypass: 'always' })
`

const installed = await installLight(t)
await link(installed.dir, '@types/node')
await link(installed.dir, 'undici-types')
await writeFile(join(installed.dir, 'package.json'), '{ "type": "module" }')
await writeFile(join(installed.dir, 'consumer.ts'), CONSUMER)

for (const [moduleResolution, module] of [['node16', 'node16'], ['bundler', 'esnext']] as const) {
  await t.test(moduleResolution, async t => {
    const compiled = spawnSync(process.execPath, [
      join(packageRoot(), 'node_modules', 'typescript-5.4', 'bin', 'tsc'),
      '--noEmit', '--strict', '--exactOptionalPropertyTypes', '--skipLibCheck', 'false', '--target', 'es2022', '--lib', 'es2023', '--types', 'node', '--module', module, '--moduleResolution', moduleResolution, 'consumer.ts'
    ], { cwd: installed.dir, encoding: 'utf8' })
    t.equal(compiled.stdout, '')
    t.equal(compiled.status, 0, compiled.stderr)
  })
}
