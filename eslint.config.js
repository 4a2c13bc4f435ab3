import neostandard from 'neostandard'

export default [
  ...neostandard({ ts: true, ignores: ['dist/**', '.build/**', '.tap/**', 'node_modules/**', 'engines/models/*/train/**'] }),
  {
    rules: {
      'no-restricted-imports': ['error', { paths: [{ name: 'onnxruntime-node', message: 'Only engines/runtime opens inference sessions.' }] }]
    }
  },
  {
    files: ['plugin/ui/page/**'],
    languageOptions: { globals: { CSS: 'readonly', EventSource: 'readonly', Option: 'readonly', addEventListener: 'readonly' } }
  },
  { files: ['engines/runtime/**', 'test/**'], rules: { 'no-restricted-imports': 'off' } }
]
