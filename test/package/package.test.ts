/** What is in the package, and what it says of itself. */
import { spawnSync } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { dirname, join, posix } from 'node:path'
import t from 'tap'
import { VERSION } from '../../adapters/wire/version.ts'
import { packageRoot } from '../helper/package-root.ts'

interface Manifest {
  readonly version: string
  readonly repository: { readonly url: string }
  readonly dependencies: Record<string, string>
  readonly devDependencies: Record<string, string>
  readonly peerDependencies: Record<string, string>
  readonly peerDependenciesMeta: Record<string, { optional?: boolean }>
  readonly exports: Record<string, string | Record<string, string>>
}

const read = async (file: string): Promise<string> => await readFile(join(packageRoot(), file), 'utf8')
const manifest = JSON.parse(await read('package.json')) as Manifest
const files = packedFiles()
const packed = new Set(files)

/** Paths of the files that `npm pack` packs. */
function packedFiles (): string[] {
  const { stdout, stderr } = spawnSync('npm', ['pack', '--dry-run', '--json', '--ignore-scripts'], { cwd: packageRoot(), encoding: 'utf8' })
  const found = /"files": (\[[^\]]*\])/.exec(stdout)
  if (found === null) throw new Error(`npm pack: ${stderr}`)
  return (JSON.parse(found[1]!) as Array<{ path: string }>).map(({ path }) => path)
}

t.test('the version in the code is that of package.json', async t => {
  t.equal(VERSION, manifest.version)
  t.match(manifest.repository.url, /^git\+https:\/\/.*\.git$/)
})

t.test('it has the page, the model, the schema and all that exports names, and no tests', async t => {
  for (const file of ['plugin/ui/page/index.html', 'engines/models/tiny-internvl/onnx/vision_encoder.onnx', 'engines/models/tiny-internvl/tokenizer.json', 'docs/examples/shapes.png', 'dist/plugin/cli/main.js']) t.ok(packed.has(file), file)
  for (const target of Object.values(manifest.exports).flatMap(entry => typeof entry === 'string' ? entry : Object.values(entry))) t.ok(packed.has(target.replace(/^\.\//, '')), target)
  t.same(files.filter(file => /^dist\/(test|docs)|\.test\.|\.tsbuildinfo$|\.py$/.test(file)), [])
})

t.test('it has the files of deploy/ that docs/production.md links', async t => {
  const links = [...(await read('docs/production.md')).matchAll(/\]\(\.\.\/(deploy\/[^)]*)\)/g)].map(([, link]) => link!)
  t.ok(links.length > 0)
  for (const link of links) t.ok(packed.has(link) || files.some(file => file.startsWith(`${link}/`)), link)
})

t.test('every source map has its sources', async t => {
  const maps = files.filter(file => file.endsWith('.map'))
  for (const file of maps) {
    const { sources, sourcesContent } = JSON.parse(await read(file)) as { sources: string[], sourcesContent?: Array<string | null> }
    const missing = sources.filter((source, i) => typeof sourcesContent?.[i] !== 'string' && !packed.has(posix.join(dirname(file), source)))
    if (missing.length > 0) t.fail(`${file}: no ${missing.join()}`)
  }
  for (const file of files.filter(file => file.endsWith('.js') && file.startsWith('dist/'))) {
    const map = /^\/\/# sourceMappingURL=(.*)$/m.exec((await read(file)).slice(-300))?.[1]
    if (map !== undefined && !packed.has(posix.join(dirname(file), map))) t.fail(`${file}: no ${map}`)
  }
})

t.test("the gateway's declarations and code import installed packages only; engines may import the optional peers", async t => {
  const imports = /(?:\bfrom |\bimport ?\(?)["']([^."'][^"']*)["']/g
  for (const file of files.filter(file => /^dist\/.*\.(js|d\.ts)$/.test(file))) {
    const allowed = { ...manifest.dependencies, ...(file.startsWith('dist/engines/') || file.endsWith('thumbnails.d.ts') ? manifest.peerDependencies : {}) }
    for (const [, specifier] of (await read(file)).matchAll(imports)) {
      const name = specifier!.startsWith('@') ? specifier!.split('/').slice(0, 2).join('/') : specifier!.split('/')[0]!
      if (!name.startsWith('node:') && !Object.hasOwn(allowed, name)) t.fail(`${file} imports ${name}`)
    }
  }
})

t.test('the native packages of the engines are optional peers, and a clone installs them', async t => {
  t.same(Object.keys(manifest.peerDependencies), Object.keys(manifest.peerDependenciesMeta))
  for (const [name, { optional }] of Object.entries(manifest.peerDependenciesMeta)) {
    t.equal(optional, true, name)
    t.ok(manifest.devDependencies[name], name)
  }
})
