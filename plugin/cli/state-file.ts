/** A file that keeps over a restart what registers at run time, and what is drained. */
import { accessSync, constants } from 'node:fs'
import { rename, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import type { Gateway } from '../gateway.ts'
import type { SavedNodes } from '../registry/index.ts'
import { readNamedFile } from './named-file.ts'
import { UsageError } from './usage.ts'

/** @throws UsageError where there can be no such file, or it is none */
export function checkStateFile (file: string): void {
  read(file)
  try {
    accessSync(dirname(file), constants.W_OK)
  } catch (err) {
    throw new UsageError(`server.stateFile: can't write into ${dirname(file)} (${(err as NodeJS.ErrnoException).code})`)
  }
}

/** Adds what the file holds, and writes it anew whenever that changes. Returns what waits for the last write. */
export function keepNodes (file: string, { registry, log }: Pick<Gateway, 'registry' | 'log'>): () => Promise<void> {
  checkStateFile(file)
  const { nodes, drained } = read(file)
  for (const { peer, ...node } of nodes) {
    try {
      registry.add(node, { peer })
    } catch (err) {
      throw new UsageError(`server.stateFile: ${file}: ${(err as Error).message}`)
    }
  }
  for (const url of drained) registry.drain(url, true)

  let written = ''
  let writing: Promise<void> | undefined
  const save = async (): Promise<void> => {
    for (let text = textOf(registry.saved()); text !== written; text = textOf(registry.saved())) {
      try {
        // As a whole or not at all: a gateway that is killed while it writes must find the old one.
        await writeFile(file + '.new', text, { mode: 0o600 })
        await rename(file + '.new', file)
      } catch (err) {
        log.error({ err, file }, 'the nodes that registered could not be kept')
      }
      written = text
    }
  }
  const changed = (): void => { writing ??= save().finally(() => { writing = undefined }) }
  registry.on('change', changed)
  changed()
  return async () => {
    registry.off('change', changed)
    await writing
  }
}

function textOf (saved: SavedNodes): string {
  return JSON.stringify(saved, null, 2) + '\n'
}

function read (file: string): SavedNodes {
  try {
    const saved = JSON.parse(readNamedFile(file).toString()) as Partial<SavedNodes> | null
    if (!Array.isArray(saved?.nodes) || !Array.isArray(saved.drained)) throw new TypeError('it has no nodes')
    return saved as SavedNodes
  } catch (err) {
    if ((err as NodeJS.ErrnoException).code === 'ENOENT') return { nodes: [], drained: [] }
    throw new UsageError(`server.stateFile: ${file} can't be read as one (${(err as Error).message})`)
  }
}
