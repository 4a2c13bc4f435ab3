import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { dirname, extname, resolve } from 'node:path'
import { OptionsError, resolveOptions, type EpdOptions, type OptionsProblem } from '../options/index.ts'
import { parseJson, SyntaxMistake, type Parsed } from './config/json.ts'
import { fillVariables, scalarOf } from './config/variables.ts'
import { UsageError } from './usage.ts'

/** The first of these in the working directory is read when `--config` is not given. */
export const DEFAULT_CONFIG_FILES: readonly string[] = ['epd.config.json', 'epd.config.jsonc', 'epd.config.yaml', 'epd.config.yml']

export interface LoadedConfig {
  /** With variables filled in, and with paths from the file's folder. It fits the schema; the plugin resolves it itself. */
  readonly raw: EpdOptions
  /** Undefined when there is no file and the defaults apply. */
  readonly file: string | undefined
}

/**
 * Reads and checks a configuration file. Messages have the form that editors jump to: `file:line:column: what is wrong`.
 *
 * @throws UsageError when the file is missing, is not JSON or YAML, or does not fit the options' schema
 */
export async function loadConfig (given: string | undefined): Promise<LoadedConfig> {
  const file = given ?? DEFAULT_CONFIG_FILES.find(name => existsSync(name))
  if (file === undefined) return { raw: {}, file }
  const text = await readText(file)
  const parsed = await parse(file, text)
  const refuse = (problems: ReadonlyArray<readonly [pointer: string, message: string]>): never => {
    throw new UsageError(problems.map(([pointer, message]) => `${file}:${position(text, offsetOf(parsed, pointer))}: ${message}`).join('\n'))
  }
  const folder = dirname(resolve(file))
  const { value, pointers, mistakes } = fillVariables(parsed.value, { env: process.env, folder })
  if (value === null) return refuse([['', 'options must be an object, not null']])
  if (mistakes.length > 0) return refuse(mistakes.map(({ pointer, message }) => [pointer, message]))
  try {
    return { raw: withPaths(check(value, pointers), folder), file }
  } catch (err) {
    if (!(err instanceof OptionsError)) throw err
    return refuse(err.problems.map(problem => [problem.instancePath, withoutSecrets(problem, pointers)]))
  }
}

/** What variables stand for is text: where an option wants a number or a truth value, it is read as one. */
function check (value: unknown, pointers: ReadonlySet<string>): EpdOptions {
  try {
    resolveOptions(value)
    return value as EpdOptions
  } catch (err) {
    if (!(err instanceof OptionsError)) throw err
    const wrong = err.problems.filter(({ instancePath }) => pointers.has(instancePath))
    const typed = wrong.reduce<unknown>((all, { instancePath }) => replaceAt(all, partsOf(instancePath)), value)
    if (wrong.length === 0) throw err
    resolveOptions(typed)
    return typed as EpdOptions
  }
}

/** Paths of files begin where the file with them lies, wherever the gateway was started. */
function withPaths (options: EpdOptions, folder: string): EpdOptions {
  const { server, embedded } = options
  const { tls, stateFile } = server ?? {}
  return {
    ...options,
    ...(typeof embedded !== 'object' || embedded.model === undefined ? {} : { embedded: { ...embedded, model: resolve(folder, embedded.model) } }),
    ...(server === undefined
      ? {}
      : {
          server: {
            ...server,
            ...(tls === undefined ? {} : { tls: { ...tls, cert: resolve(folder, tls.cert), key: resolve(folder, tls.key), ...(tls.clientCa === undefined ? {} : { clientCa: resolve(folder, tls.clientCa) }) } }),
            ...(stateFile === undefined ? {} : { stateFile: resolve(folder, stateFile) })
          }
        })
  }
}

function replaceAt (value: unknown, [part, ...rest]: readonly string[]): unknown {
  if (part === undefined) return scalarOf(value) ?? value
  if (Array.isArray(value)) return value.map((item, i) => (String(i) === part ? replaceAt(item, rest) : item))
  return { ...value as object, [part]: replaceAt((value as Record<string, unknown>)[part], rest) }
}

/** A message shows the value at fault. What comes from a variable may be a secret. */
function withoutSecrets ({ instancePath, message }: OptionsProblem, pointers: ReadonlySet<string>): string {
  const secret = [...pointers].some(pointer => pointer === instancePath || pointer.startsWith(instancePath + '/'))
  return secret ? message.replace(/, not [^]*$/, ', not what its variable stands for') : message
}

async function readText (file: string): Promise<string> {
  try {
    // Some editors write a byte order mark.
    return (await readFile(file, 'utf8')).replace(/^\uFEFF/, '')
  } catch (err) {
    throw new UsageError(`--config: can't read ${file} (${(err as NodeJS.ErrnoException).code ?? String(err)})`)
  }
}

async function parse (file: string, text: string): Promise<Parsed> {
  try {
    return /^\.ya?ml$/i.test(extname(file)) ? (await import('./config/yaml.ts')).parseYaml(text) : parseJson(text)
  } catch (err) {
    if (!(err instanceof SyntaxMistake)) throw err
    throw new UsageError(`${file}:${position(text, err.offset)}: ${err.message}`)
  }
}

/** Offset of the value at a JSON pointer; for a missing member, of its nearest parent. */
function offsetOf (parsed: Parsed, pointer: string): number {
  const path = partsOf(pointer)
  for (let depth = path.length; depth > 0; depth--) {
    const found = parsed.offsetOf(path.slice(0, depth))
    if (found !== undefined) return found
  }
  return parsed.offsetOf([]) ?? 0
}

function partsOf (pointer: string): string[] {
  return pointer.split('/').slice(1).map(part => part.replaceAll('~1', '/').replaceAll('~0', '~'))
}

function position (text: string, offset: number): string {
  const before = text.slice(0, offset).split('\n')
  return `${before.length}:${before.at(-1)!.length + 1}`
}
