import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'

/** A file of this name and text in a folder of its own; gone after the test. */
export async function tempFile (t: Pick<Test, 'teardown'>, name: string, text: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'fastify-epd-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const file = join(folder, name)
  await writeFile(file, text)
  return file
}
