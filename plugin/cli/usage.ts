import { parseArgs, type ParseArgsConfig } from 'node:util'
import { clean } from './terminal.ts'

const UNITS: Readonly<Record<string, number>> = { ms: 1, s: 1_000, m: 60_000, h: 3_600_000 }
const LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'silent'] as const

/** A mistake in how a command was called: one line on stderr and exit code 2. */
export class UsageError extends Error {}

/** `parseArgs` that throws its errors as usage errors of one line. */
export function parseFlags<T extends ParseArgsConfig> (config: T): ReturnType<typeof parseArgs<T>> {
  try {
    return parseArgs(config)
  } catch (err) {
    throw new UsageError((err as Error).message.split('\n')[0])
  }
}

/** The port number of a flag; 0 takes a free one. */
export function portOf (flag: string, text: string): number {
  const port = Number(text)
  if (!/^\d+$/.test(text) || port > 65_535) throw new UsageError(`${flag} must be a whole number from 0 to 65535, not '${text}'`)
  return port
}

/** Undefined where the flag is not given. */
export function whole (flag: string, text: string | undefined, min: number, max: number): number | undefined {
  if (text === undefined) return undefined
  const value = Number(text)
  if (!/^\d+$/.test(text) || value < min || value > max) throw new UsageError(`${flag} must be a whole number from ${min} to ${max}, not '${text}'`)
  return value
}

/** Milliseconds; undefined where the flag is not given. */
export function timeOf (flag: string, text: string | undefined): number | undefined {
  if (text === undefined) return undefined
  const [, count, unit] = /^(\d+(?:\.\d+)?)(ms|s|m|h)$/.exec(text) ?? []
  const ms = Number(count) * UNITS[unit ?? '']!
  // The longest that a timer of Node.js waits.
  if (!(ms > 0 && ms < 2 ** 31)) throw new UsageError(`${flag} must be a time such as 500ms, 2s or 1m, not '${text}'`)
  return ms
}

/** The URL without trailing slashes. */
export function httpUrl (flag: string, value: string): string {
  if (!/^https?:\/\//i.test(value) || !URL.canParse(value)) throw new UsageError(`${flag} must be an http or https URL, not '${value}'`)
  if (/[?#]/.test(value)) throw new UsageError(`${flag} must be a base URL, without ? and #, not '${value}'`)
  return value.replace(/\/+$/, '')
}

/** A value that a header can have: undici's own error says nothing of the flag. */
export function headerValue (flag: string, value: string): string {
  if (!/^[\t\x20-\x7e]*$/.test(value)) throw new UsageError(`${flag} has characters that a header can't have`)
  return value
}

export function oneOf<T extends string> (flag: string, value: string | undefined, choices: readonly T[]): T {
  const found = choices.find(choice => choice === value)
  if (found !== undefined) return found
  throw new UsageError(`${flag} must be one of ${choices.join(', ')}${value === undefined ? '' : `, not '${value}'`}`)
}

/** A log level. */
export function levelOf (flag: string, text: string): string {
  return oneOf(flag, text, LEVELS)
}

/** Runs a command; a usage error prints a hint and gives exit code 2. */
export async function withUsage (command: string, run: () => Promise<number>): Promise<number> {
  try {
    return await run()
  } catch (err) {
    if (!(err instanceof UsageError)) throw err
    process.stderr.write(`fastify-epd ${command}: ${err.message.split('\n').map(clean).join('\n')}\nfastify-epd ${command} --help lists the options.\n`)
    return 2
  }
}
