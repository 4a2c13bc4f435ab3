/** Installed with `--omit=optional`: a gateway routes, and an engine says what to install. */
import { spawnSync } from 'node:child_process'
import { cp, mkdir, mkdtemp, readdir, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { packageRoot } from '../../engines/service/package-root.ts'

const BUILD = fileURLToPath(new URL('../..', import.meta.url))
const OPTIONAL = new Set(['onnxruntime-node', 'onnxruntime-common', 'zeromq', 'sharp', '@img', '@huggingface'])

/** A copy of the package beside a node_modules without the optional packages, outside of the project. */
async function lightInstall (): Promise<string> {
  const dir = await mkdtemp(join(tmpdir(), 'fastify-epd-light-'))
  t.teardown(() => rm(dir, { recursive: true, force: true }))
  for (const folder of ['plugin', 'adapters', 'engines']) await cp(join(BUILD, folder), join(dir, 'dist', folder), { recursive: true })
  await cp(join(packageRoot(), 'package.json'), join(dir, 'package.json'))
  await cp(join(packageRoot(), 'plugin', 'ui', 'page'), join(dir, 'plugin', 'ui', 'page'), { recursive: true })
  await mkdir(join(dir, 'node_modules'))
  for (const name of await readdir(join(packageRoot(), 'node_modules'))) {
    if (!OPTIONAL.has(name)) await symlink(join(packageRoot(), 'node_modules', name), join(dir, 'node_modules', name))
  }
  return dir
}

const dir = await lightInstall()
const main = join(dir, 'dist', 'plugin', 'cli', 'main.js')

await t.test('an engine tells in one line which packages to install', async t => {
  const engine = spawnSync(process.execPath, [main, 'engine', '--role', 'encoder'], { encoding: 'utf8', cwd: dir })
  t.equal(engine.status, 1)
  t.match(engine.stderr, /npm i --ignore-scripts onnxruntime-node@1\.29\.0 zeromq@\S+ sharp@\S+ @huggingface\/jinja@\S+ @huggingface\/tokenizers@\S+/)
  t.equal(engine.stdout, '')
})

await t.test('a gateway with nodes of its own starts and answers', async t => {
  const program = `
    import Fastify from 'fastify'
    import epd from ${JSON.stringify(join(dir, 'dist', 'plugin', 'index.js'))}
    const app = Fastify()
    await app.register(epd, { nodes: [{ url: 'http://127.0.0.1:9', role: 'hybrid', adapter: 'openai', models: ['m'] }] })
    const url = await app.listen({ port: 0, host: '127.0.0.1' })
    const answer = await fetch(url + '/v1/chat/completions', { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{"model":"m","messages":[]}' })
    console.log(answer.status, (await answer.json()).error.code)
    await app.close()`
  const gateway = spawnSync(process.execPath, ['--input-type=module', '--eval', program], { encoding: 'utf8', cwd: dir })
  t.equal(gateway.stdout.trim(), '503 no_healthy_node', gateway.stderr)
})
