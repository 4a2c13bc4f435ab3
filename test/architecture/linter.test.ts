/** The linter refuses each arrow that docs/architecture.md forbids. */
import { join } from 'node:path'
import { ESLint } from 'eslint'
import t from 'tap'
import { packageRoot } from '../helper/package-root.ts'

interface Row { readonly in: string, readonly except?: readonly string[], readonly imports: string, readonly lazily?: boolean, readonly why: string }

/** An import that each row's pattern refuses, as seen from a file two folders below the root. */
const SAMPLES = ['../../plugin/index.ts', '../../engines/index.ts', '../../test/helper/until.ts', '../../adapters/index.ts', '../http/handle.ts', '../pipeline/index.ts', '../telemetry/spans.ts', '../adapter.ts', 'fastify', 'onnxruntime-node', 'zeromq']
/** Each has a line of its own in one file. */
const WAYS = {
  import: (path: string) => `import '${path}'`,
  're-export': (path: string) => `export * from '${path}'`,
  'import type': (path: string) => `import type { X } from '${path}'`,
  'import()': (path: string) => `export const x = await import('${path}')`,
  'import().Type': (path: string) => `export type Z = import('${path}').X`
}

const root = packageRoot()
const { FORBIDDEN } = await import(join(root, 'eslint.config.js')) as { FORBIDDEN: readonly Row[] }
const eslint = new ESLint({ cwd: root })

/** What is said of each line. */
async function refusals (folder: string, ...lines: string[]): Promise<string[][]> {
  const [result] = await eslint.lintText(`${lines.join('\n')}\n`, { filePath: join(root, folder, 'sample.ts') })
  return lines.map((_, i) => result!.messages.filter(({ line }) => line === i + 1).map(({ message }) => message))
}

for (const row of FORBIDDEN) {
  await t.test(`${row.in} must not import ${row.imports}`, async t => {
    const path = SAMPLES.find(sample => new RegExp(row.imports).test(sample))!
    t.ok(path, 'a sample of it')
    const refused = (messages: readonly string[]): boolean => messages.some(message => message.includes(row.why.replace(/\.$/, '')))
    const ways = Object.keys(WAYS)
    t.same((await refusals(row.in, ...Object.values(WAYS).map(code => code(path)))).map(refused), ways.map(way => !(row.lazily === true && way.startsWith('import()'))), `${ways.join(', ')} of ${path}`)
    for (const folder of row.except ?? []) {
      t.same((await refusals(folder, WAYS.import(path))).map(refused), [false], `${folder} may`)
    }
  })
}

await t.test('an import that follows the arrows is not refused', async t => {
  t.same(await refusals('plugin/pipeline', "import '../../adapters/adapter.ts'"), [[]])
  t.same(await refusals('engines/llm', "import '../../adapters/wire/semconv.ts'"), [[]])
})
