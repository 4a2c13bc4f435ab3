/**
 * Runs test files one after the other in this process, each as a subtest: what they load is loaded once, and compiled
 * once. For files that leave a process as they found it. A file runs by itself as well.
 */
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import t, { type Test } from 'tap'

/** What files use of tap's root, which is the subtest of the file here. */
const USED = ['test', 'teardown', 'setTimeout', 'testdir', 'ok', 'notOk', 'equal', 'not', 'same', 'match', 'pass', 'fail', 'comment'] as const

// Not arguments: tap names the folders of all tests by those.
const files = process.env.EPD_TEST_FILES!.split('\n')
delete process.env.EPD_TEST_FILES
/** The file's share of what the runner gives this process. */
const timeout = Number(process.env.TAP_TIMEOUT) * 1_000 / files.length
const start = t.test.bind(t)
let file: Test
for (const name of USED) Object.defineProperty(t, name, { value: (...args: never[]) => (file[name] as (...args: never[]) => unknown)(...args) })

for (const path of files) {
  await start(path, { timeout }, async t => {
    file = t
    await import(pathToFileURL(resolve(path)).href)
  })
}
