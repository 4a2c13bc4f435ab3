/** `${NAME}` and `${file:PATH}` in the strings of a configuration, both with `:-default`. */
import { resolve } from 'node:path'
import { readFailure, readNamedFile } from '../named-file.ts'

export interface Filled {
  readonly value: unknown
  /** JSON pointers of the strings that had variables in them. */
  readonly pointers: ReadonlySet<string>
  readonly mistakes: ReadonlyArray<{ readonly pointer: string, readonly message: string }>
}

export interface Sources {
  readonly env: NodeJS.ProcessEnv
  /** Where paths of files begin. */
  readonly folder: string
}

/** `$${` stands for `${`. */
const VARIABLE = /\$(\$\{)|\$\{([^}]*)\}/g
const NAME = /^(?:file:(?<file>.+?)|(?<name>[A-Za-z_]\w*))(?::-(?<fallback>[^]*))?$/

/** A copy of the value with what the variables stand for. */
export function fillVariables (value: unknown, sources: Sources): Filled {
  const pointers = new Set<string>()
  const mistakes: Array<{ pointer: string, message: string }> = []
  const fill = (one: unknown, pointer: string): unknown => {
    if (Array.isArray(one)) return one.map((item, i) => fill(item, `${pointer}/${i}`))
    if (typeof one === 'object' && one !== null) return Object.fromEntries(Object.entries(one).map(([key, member]) => [key, fill(member, `${pointer}/${key.replaceAll('~', '~0').replaceAll('/', '~1')}`)]))
    if (typeof one !== 'string' || !one.includes('${')) return one
    pointers.add(pointer)
    try {
      return one.replace(VARIABLE, (whole, escaped: string | undefined, inner: string) => escaped ?? valueOf(whole, inner, sources))
    } catch (err) {
      mistakes.push({ pointer, message: (err as Error).message })
      return one
    }
  }
  return { value: fill(value, ''), pointers, mistakes }
}

function valueOf (whole: string, inner: string, { env, folder }: Sources): string {
  const { file, name, fallback } = NAME.exec(inner)?.groups ?? {}
  if (file !== undefined && fallback?.includes('${') !== true) return contents(resolve(folder, file), whole) ?? fallback ?? missing(`${whole}: there is no such file, and no default`)
  if (name === undefined || fallback?.includes('${') === true) throw new Error(`${whole} must be \${NAME}, \${NAME:-default} or \${file:PATH}; $\${ is a plain \${, and a default holds no variable`)
  // As in a shell, a variable that is empty has the default too.
  return env[name] || (fallback ?? missing(`the environment variable ${name} is ${env[name] === '' ? 'empty' : 'not set'}, and ${whole} has no default`))
}

/** Undefined when there is no such file. Editors end a file with a line break, which is not of the secret. */
function contents (path: string, whole: string): string | undefined {
  try {
    return readNamedFile(path).toString().replace(/\r?\n$/, '')
  } catch (err) {
    if ((err as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw new Error(`${whole} can't be read (${readFailure(err)})`)
  }
}

function missing (message: string): never {
  throw new Error(message)
}

/** The number or truth value that a text says, where an option wants one; undefined for others. */
export function scalarOf (text: unknown): number | boolean | undefined {
  if (typeof text !== 'string') return undefined
  if (text === 'true' || text === 'false') return text === 'true'
  return /^-?\d+(\.\d+)?$/.test(text) ? Number(text) : undefined
}
