/** The package beside a consumer: TypeScript 5.4 compiles it, and a bundle of it by esbuild starts. */
import { spawnSync } from 'node:child_process'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { build } from 'esbuild'
import t from 'tap'
import ts from 'typescript-5.4'
import { installLight, link } from '../helper/install.ts'

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

const FULL = process.env.EPD_TEST_FULL === '1'
const installed = await installLight(t)
await link(installed.dir, '@types/node')
await link(installed.dir, 'undici-types')
await writeFile(join(installed.dir, 'package.json'), '{ "type": "module" }')
await writeFile(join(installed.dir, 'consumer.ts'), CONSUMER)

await t.test('a gateway bundled into one file answers where neither the package nor its files are', async t => {
  const empty = t.testdir()
  const outfile = join(empty, 'gateway.mjs')
  await build({
    stdin: { contents: GATEWAY, resolveDir: installed.dir, loader: 'js' },
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

// What the consumer's own compiler checks without skipLibCheck. Declarations of other packages, half of the time, are left to the full run.
for (const [moduleResolution, module] of FULL ? [['node16', 'node16'], ['bundler', 'esnext']] as const : [['node16', 'node16']] as const) {
  await t.test(`TypeScript 5.4 compiles a consumer against the declarations as ${moduleResolution} resolves them`, async t => {
    const { options } = ts.convertCompilerOptionsFromJson({
      noEmit: true, strict: true, exactOptionalPropertyTypes: true, skipLibCheck: false, target: 'es2022', lib: ['es2023'], types: ['node'], module, moduleResolution
    }, installed.dir)
    const host = ts.createCompilerHost(options)
    host.getCurrentDirectory = () => installed.dir
    const program = ts.createProgram([join(installed.dir, 'consumer.ts')], options, host)
    const files = program.getSourceFiles().filter(({ fileName }) => FULL || fileName.startsWith(installed.root) || fileName.endsWith('/consumer.ts'))
    t.ok(files.length > 10)
    const problems = [...program.getOptionsDiagnostics(), ...program.getGlobalDiagnostics(), ...files.flatMap(file => [...program.getSyntacticDiagnostics(file), ...program.getSemanticDiagnostics(file)])]
    t.equal(ts.formatDiagnostics(problems, host), '')
  })
}
