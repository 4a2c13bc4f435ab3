/** `npm install fastify fastify-epd`, without the optional peers: a gateway routes, and an engine says what to install. */
import { spawnSync } from 'node:child_process'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import t from 'tap'
import { installLight } from '../helper/install.ts'
import { packageRoot } from '../helper/package-root.ts'

const { dir, root } = await installLight(t)

await t.test('an engine says in one line which packages to install, and the README has that line', async t => {
  const engine = spawnSync(process.execPath, [join(root, 'dist', 'plugin', 'cli', 'main.js'), 'engine', '--role', 'encoder'], { encoding: 'utf8', cwd: dir })
  t.equal(engine.status, 1)
  const packages = /npm install --ignore-scripts (onnxruntime-node zeromq sharp @huggingface\/jinja @huggingface\/tokenizers)$/m.exec(engine.stderr)?.[1]
  t.ok(packages, engine.stderr)
  t.ok((await readFile(join(packageRoot(), 'README.md'), 'utf8')).includes(`\nnpm install --ignore-scripts fastify-epd ${packages}\n`))
  t.equal(engine.stdout, '')
})

await t.test('a configuration that needs a package is refused at the start, and by --check, at its place', async t => {
  await writeFile(join(dir, 'epd.config.yaml'), 'nodes: [{ url: "http://127.0.0.1:9" }]\nrates:\n  redis: redis://127.0.0.1:1\ndiscover:\n  - kubernetes: { selector: a=b, port: 1 }\n')
  for (const flags of [['--check'], ['--port', '0', '--workers', '2']]) {
    const serve = spawnSync(process.execPath, [join(root, 'dist', 'plugin', 'cli', 'main.js'), 'serve', ...flags], { encoding: 'utf8', cwd: dir })
    t.equal(serve.status, 2)
    t.match(serve.stderr, /yaml:3:10: rates\.redis needs the package ioredis/)
    t.match(serve.stderr, /yaml:5:17: discover\[0\]\.kubernetes needs the package @kubernetes\/client-node/)
  }
})

await t.test('embedded engines without their packages: serve and --check refuse, the plugin starts none and /readyz says why', async t => {
  await writeFile(join(dir, 'empty.json'), '{}')
  for (const flags of [['--check'], ['--port', '0']]) {
    const serve = spawnSync(process.execPath, [join(root, 'dist', 'plugin', 'cli', 'main.js'), 'serve', '--config', 'empty.json', ...flags], { encoding: 'utf8', cwd: dir })
    t.match(serve, { status: 2, stdout: '', stderr: /^fastify-epd serve: empty\.json: embedded: engines need packages that are not installed \(onnxruntime-node, .*npm install/ })
  }
  const program = `
    import Fastify from 'fastify'
    import epd from 'fastify-epd'
    const app = Fastify()
    await app.register(epd)
    const url = await app.listen({ port: 0, host: '127.0.0.1' })
    await app.epd.embedded.ready.catch(() => {})
    const answer = await fetch(url + '/readyz')
    console.log(answer.status, (await answer.json()).why, app.epd.embedded.pids().length)
    await app.close()`
  const gateway = spawnSync(process.execPath, ['--input-type=module', '--eval', program], { encoding: 'utf8', cwd: dir })
  t.match(gateway.stdout, /^503 embedded: engines need packages .* 0\n$/, gateway.stderr)
})

await t.test('a gateway with nodes of its own starts and answers', async t => {
  const program = `
    import Fastify from 'fastify'
    import epd from 'fastify-epd'
    const app = Fastify()
    await app.register(epd, { nodes: [{ url: 'http://127.0.0.1:9', role: 'hybrid', adapter: 'openai', models: ['m'] }] })
    const url = await app.listen({ port: 0, host: '127.0.0.1' })
    const answer = await fetch(url + '/v1/chat/completions', { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{"model":"m","messages":[]}' })
    console.log(answer.status, (await answer.json()).error.code)
    await app.close()`
  const gateway = spawnSync(process.execPath, ['--input-type=module', '--eval', program], { encoding: 'utf8', cwd: dir })
  t.equal(gateway.stdout.trim(), '503 no_healthy_node', gateway.stderr)
})
