import neostandard from 'neostandard'

/**
 * The arrows of docs/architecture.md: what the files of a folder must not import, as a pattern of the import's path, and why.
 * `lazily`: an `import()` may.
 * test/architecture/linter.test.ts shows one refusal for each row.
 */
export const FORBIDDEN = [
  { in: 'adapters', imports: '/(plugin|engines|test)/', why: 'Arrows point one way: plugin imports adapters.' },
  { in: 'adapters', imports: '^(fastify|fastify-plugin|@fastify/.+)$', why: 'An adapter works without Fastify.' },
  { in: 'adapters/wire', imports: '^\\.\\./', why: 'adapters/wire holds what both ends of a wire agree on and imports nothing of ours.' },
  { in: 'engines', imports: '/(plugin|test)/', why: 'Engines do not know the gateway.' },
  { in: 'engines', imports: '/adapters/(?!wire/)', why: 'Engines know of adapters only adapters/wire.' },
  { in: 'engines', except: ['engines/server'], imports: '^(fastify|fastify-plugin|@fastify/.+)$', why: 'Only the engines\' HTTP server uses Fastify.' },
  { in: 'engines', except: ['engines/runtime'], imports: '^onnxruntime-node$', why: 'Only engines/runtime opens inference sessions.' },
  { in: 'plugin', except: ['plugin/cli'], imports: '/engines/', why: 'The gateway starts engines as processes; it never imports them.' },
  { in: 'plugin', imports: '/test/', why: 'Nothing that is shipped imports tests.' },
  { in: 'plugin', lazily: true, imports: '^(onnxruntime-node|zeromq|sharp)$', why: 'A gateway works without the engines\' native packages.' },
  ...['plugin/body', 'plugin/planning', 'plugin/registry', 'plugin/pipeline'].flatMap(room => [
    { in: room, imports: '^(fastify|fastify-plugin|@fastify/.+)$', why: 'The core knows no Fastify.' },
    { in: room, imports: '/(http|ui|cli|embedded)/', why: 'The core knows nothing of the rooms that stand on it.' }
  ]),
  { in: 'plugin/planning', imports: '/(pipeline|telemetry|traces)/', why: 'The planner is a pure function of request, snapshot and options.' },
  { in: 'plugin/body', imports: '/(planning|registry|pipeline|telemetry|traces)/', why: 'Reading a body needs no other room.' },
  { in: 'plugin/registry', imports: '/(planning|pipeline)/', why: 'The registry serves planner and pipeline, not the other way round.' }
]

/**
 * Import statements, re-exports, `import()` and `import('x').Type` alike. ESLint replaces a rule of an earlier entry by that of
 * a later one, so each folder gets all rows that hold for it.
 */
function arrows () {
  const folders = [...new Set(FORBIDDEN.flatMap(row => [row.in, ...row.except ?? []]))].sort((a, b) => a.length - b.length)
  return folders.map(folder => {
    const rows = FORBIDDEN.filter(row => isWithin(folder, row.in) && !row.except?.some(except => isWithin(folder, except)))
    return {
      files: [`${folder}/**/*.ts`],
      rules: {
        'no-restricted-imports': ['error', { patterns: rows.map(({ imports, why }) => ({ regex: imports, message: why })) }],
        'no-restricted-syntax': ['error', ...rows.filter(row => !row.lazily).map(({ imports, why }) => ({ selector: `:matches(ImportExpression, TSImportType) Literal[value=/${imports.replaceAll('/', '\\u002f')}/]`, message: why }))]
      }
    }
  })
}

function isWithin (folder, other) {
  return folder === other || folder.startsWith(other + '/')
}

export default [
  ...neostandard({ ts: true, ignores: ['dist/**', '.build/**', '.tap/**', 'node_modules/**', 'engines/models/*/train/**'] }),
  ...arrows(),
  {
    files: ['plugin/ui/page/**'],
    languageOptions: { globals: { CSS: 'readonly', EventSource: 'readonly', Option: 'readonly', addEventListener: 'readonly' } }
  }
]
