/** Relations of source files: no import circle, no tiny file that only one other file imports. */
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import t from 'tap'
import ts from 'typescript'
import { packageRoot } from '../helper/package-root.ts'

const SHORT = 20

const root = packageRoot()
const sources = ['adapters', 'engines', 'plugin'].flatMap(folder => readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
  .filter(file => file.endsWith('.ts')).map(file => join(folder, file)))

/** The project's files that each file imports. Types count: a reader follows them too. */
const imports = new Map(sources.map(file => {
  const { importedFiles } = ts.preProcessFile(readFileSync(join(root, file), 'utf8'))
  return [file, importedFiles.filter(({ fileName }) => fileName.startsWith('.')).map(({ fileName }) => relative(root, join(root, dirname(file), fileName)))]
}))

/** Files that import themselves through others, by a walk that marks the files on its path. */
function circles (): string[] {
  const found: string[] = []
  const done = new Set<string>()
  const path: string[] = []
  const visit = (file: string): void => {
    const at = path.indexOf(file)
    if (at !== -1) found.push([...path.slice(at), file].join(' -> '))
    if (at !== -1 || done.has(file)) return
    path.push(file)
    for (const next of imports.get(file) ?? []) visit(next)
    path.pop()
    done.add(file)
  }
  for (const file of sources) visit(file)
  return found
}

t.test('no import circle', async t => {
  t.ok(sources.length > 100, 'the sources are looked at')
  t.ok([...imports.values()].flat().every(file => !file.endsWith('.ts') || imports.has(file)), 'every import is followed')
  t.same(circles(), [])
})

t.test(`no file of plugin/ or engines/ under ${SHORT} lines that only one other file imports`, async t => {
  const importers = new Map<string, number>()
  for (const file of [...imports.values()].flatMap(files => [...new Set(files)])) importers.set(file, (importers.get(file) ?? 0) + 1)
  const short = sources.filter(file => !file.startsWith('adapters/') && importers.get(file) === 1 && readFileSync(join(root, file), 'utf8').split('\n').length - 1 < SHORT)
  t.same(short, [])
})
