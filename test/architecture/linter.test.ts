/** The linter refuses each arrow that docs/architecture.md forbids. */
import { join } from 'node:path'
import { ESLint } from 'eslint'
import t from 'tap'
import { packageRoot } from '../helper/package-root.ts'

interface Row { readonly in: string, readonly except?: readonly string[], readonly imports: string, readonly lazily?: boolean, readonly why: string }

/** An import that each row's pattern refuses, as seen from a file two folders below the root. */
const SAMPLES = ['../../plugin/index.ts', '../../engines/index.ts', '../../test/helper/until.ts', '../../adapters/index.ts', '../http/handle.ts', '../pipeline/index.ts', '../telemetry/spans.ts', '../adapter.ts', 'fastify', 'onnxruntime-node', 'zeromq']
const WAYS = {
  import: (path: string) => `import ${JSON.stringify(path).replaceAll('"', "'")}\n`,
  're-export': (path: string) => `export * from '${path}'\n`,
  'import type': (path: string) => `import type { X } from '${path}'\n\nexport type Y = X\n`,
  'import()': (path: string) => `export const x = await import('${path}')\n`,
  'import().Type': (path: string) => `export type X = import('${path}').X\n`
}

const root = packageRoot()
const { FORBIDDEN } = await import(join(root, 'eslint.config.js')) as { FORBIDDEN: readonly Row[] }
const eslint = new ESLint({ cwd: root })

async function refusals (folder: string, code: string): Promise<string[]> {
  const [result] = await eslint.lintText(code, { filePath: join(root, folder, 'sample.ts') })
  return result!.messages.map(message => message.message)
}

for (const row of FORBIDDEN) {
  await t.test(`${row.in} must not import ${row.imports}`, async t => {
    const path = SAMPLES.find(sample => new RegExp(row.imports).test(sample))!
    t.ok(path, 'a sample of it')
    for (const [way, code] of Object.entries(WAYS)) {
      const refused = (await refusals(row.in, code(path))).some(message => message.includes(row.why.replace(/\.$/, '')))
      t.equal(refused, !(row.lazily === true && way.startsWith('import()')), `${way} of ${path}`)
    }
    for (const folder of row.except ?? []) {
      t.notOk((await refusals(folder, WAYS.import(path))).some(message => message.includes(row.why.replace(/\.$/, ''))), `${folder} may`)
    }
  })
}

await t.test('an import that follows the arrows is not refused', async t => {
  t.same(await refusals('plugin/pipeline', "import '../../adapters/adapter.ts'\n"), [])
  t.same(await refusals('engines/llm', "import '../../adapters/wire/semconv.ts'\n"), [])
})
