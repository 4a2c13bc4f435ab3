import { readFile } from 'node:fs/promises'
import { findNodeAtLocation, parseTree, printParseErrorCode, getNodeValue, type Node, type ParseError } from 'jsonc-parser'
import { OptionsError, resolveOptions, type EpdOptions, type ResolvedOptions } from '../options/index.ts'
import { UsageError } from './usage.ts'

/** Read from the working directory when `--config` is not given. */
export const DEFAULT_CONFIG_FILE = 'epd.config.json'

export interface LoadedConfig {
  /** As written; the plugin resolves it itself. */
  readonly raw: EpdOptions
  readonly resolved: ResolvedOptions
  /** Undefined when there is no file and the defaults apply. */
  readonly file: string | undefined
}

/**
 * Reads and checks a configuration file. Messages have the form that editors jump to: `file:line:column: what is wrong`.
 *
 * @throws UsageError when the file is missing, is not JSON, or does not fit the options' schema
 */
export async function loadConfig (file: string | undefined): Promise<LoadedConfig> {
  const text = await readText(file)
  if (text === undefined) return { raw: {}, resolved: resolveOptions({}), file: undefined }
  const name = file ?? DEFAULT_CONFIG_FILE
  const root = parse(name, text)
  const raw = getNodeValue(root) as EpdOptions
  try {
    return { raw, resolved: resolveOptions(raw), file: name }
  } catch (err) {
    if (!(err instanceof OptionsError)) throw err
    throw new UsageError(err.problems.map(({ instancePath, message }) => `${name}:${position(text, offsetOf(root, instancePath))}: ${message}`).join('\n'))
  }
}

async function readText (file: string | undefined): Promise<string | undefined> {
  try {
    // Some editors write a byte order mark.
    return (await readFile(file ?? DEFAULT_CONFIG_FILE, 'utf8')).replace(/^\uFEFF/, '')
  } catch (err) {
    if (file === undefined && (err as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw new UsageError(`--config: can't read ${file ?? DEFAULT_CONFIG_FILE} (${(err as NodeJS.ErrnoException).code ?? String(err)})`)
  }
}

function parse (name: string, text: string): Node {
  const errors: ParseError[] = []
  const root = parseTree(text, errors, { disallowComments: true, allowTrailingComma: false })
  const first = errors[0]
  if (first !== undefined || root === undefined) {
    throw new UsageError(`${name}:${position(text, first?.offset ?? 0)}: not valid JSON (${first === undefined ? 'empty file' : printParseErrorCode(first.error)})`)
  }
  const twice = repeated(root)
  if (twice !== undefined) throw new UsageError(`${name}:${position(text, twice.offset)}: ${JSON.stringify(twice.value)} is given twice`)
  return root
}

/** The key of a member that is given twice: JSON.parse would silently take the last one. */
function repeated (node: Node): Node | undefined {
  const keys = new Set<unknown>()
  for (const child of node.children ?? []) {
    const [key] = child.type === 'property' ? child.children! : []
    if (key !== undefined && keys.has(key.value)) return key
    if (key !== undefined) keys.add(key.value)
    const below = repeated(child)
    if (below !== undefined) return below
  }
  return undefined
}

/** Offset of the value at a JSON pointer; for a missing member, of its nearest parent. */
function offsetOf (root: Node, pointer: string): number {
  const path = pointer.split('/').slice(1).map(part => part.replaceAll('~1', '/').replaceAll('~0', '~'))
  for (let depth = path.length; depth > 0; depth--) {
    const found = findNodeAtLocation(root, path.slice(0, depth).map(part => (/^\d+$/.test(part) ? Number(part) : part)))
    if (found !== undefined) return found.offset
  }
  return root.offset
}

function position (text: string, offset: number): string {
  const before = text.slice(0, offset).split('\n')
  return `${before.length}:${before.at(-1)!.length + 1}`
}
