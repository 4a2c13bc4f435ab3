/** How much code one text request crosses: `npm run walk`, held to its bound. */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'
import t from 'tap'
import { packageRoot } from '../helper/package-root.ts'

const MAX_FILES = 30
const MAX_LINES = 3_500

t.test(`a text request crosses at most ${MAX_FILES} files and ${MAX_LINES} lines`, async t => {
  const { stdout } = await promisify(execFile)(process.execPath, [join(packageRoot(), 'dist/test/walk/main.js')])
  const [, files, lines] = /(\d+) files, (\d+) lines/.exec(stdout)!
  t.ok(Number(files) > 10, 'it ran')
  t.ok(Number(files) <= MAX_FILES, stdout)
  t.ok(Number(lines) <= MAX_LINES, stdout)
})
