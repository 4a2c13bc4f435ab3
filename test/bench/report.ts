import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { cpus, totalmem } from 'node:os'
import { join } from 'node:path'
import { packageRoot } from '../helper/package-root.ts'

/** What a benchmark gets. */
export interface BenchContext {
  /** A rough answer in seconds instead of a good one in minutes. */
  readonly quick: boolean
  /** How often each side of a comparison is measured; medians are reported. */
  readonly rounds: number
  /** `--seconds`: how long one figure of `peers` is measured. */
  readonly seconds?: number | undefined
  /** `--workers`: the numbers of cores that `peers` compares. */
  readonly workers?: readonly number[] | undefined
  log (line: string): void
}

/** A benchmark module: compares with the alternative in the same run and returns Markdown. */
export interface Bench {
  readonly name: string
  run (context: BenchContext): Promise<string>
}

export function median (values: readonly number[]): number {
  return quantile(values, 0.5)
}

export function quantile (values: readonly number[], q: number): number {
  if (values.length === 0) return Number.NaN
  const sorted = [...values].sort((a, b) => a - b)
  const at = (sorted.length - 1) * q
  const low = Math.floor(at)
  return sorted[low]! + (sorted[Math.ceil(at)]! - sorted[low]!) * (at - low)
}

/** Mean of the middle of these values, without the outliers that other work on the machine causes. */
export function trimmedMean (values: readonly number[], share = 0.7): number {
  const sorted = [...values].sort((a, b) => a - b)
  const cut = Math.floor(sorted.length * (1 - share) / 2)
  const middle = sorted.slice(cut, sorted.length - cut)
  return middle.reduce((sum, value) => sum + value, 0) / middle.length
}

/** A Markdown table; numbers are given three significant digits. */
export function table (headers: readonly string[], rows: ReadonlyArray<ReadonlyArray<string | number>>): string {
  const cell = (value: string | number): string => typeof value === 'number' ? digits(value) : value
  const line = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`
  return [line(headers), line(headers.map((_, i) => i === 0 ? '---' : '---:')), ...rows.map(row => line(row.map(cell)))].join('\n')
}

function digits (value: number): string {
  if (!Number.isFinite(value)) return '-'
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString('en-GB')
  return Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(2)
}

/** One line that says what the figures were measured on. */
export function machine (): string {
  const list = cpus()
  const memory = Math.round(totalmem() / 2 ** 30)
  return `${list[0]?.model.trim() ?? 'unknown CPU'}, ${list.length} cores, ${memory} GiB, Node ${process.version}, ${process.platform} ${process.arch}, ${new Date().toISOString().slice(0, 10)}`
}

/** Puts a section between its markers in docs/benchmarks.md, or at the end when it has none yet. */
export function writeSection (name: string, markdown: string): void {
  const file = join(packageRoot(), 'docs/benchmarks.md')
  const begin = `<!-- bench:${name} -->`
  const end = `<!-- /bench:${name} -->`
  const section = `${begin}\n${markdown.trim()}\n${end}`
  const text = existsSync(file) ? readFileSync(file, 'utf8') : '# Benchmarks\n\n`npm run bench -- --write` measures and fills in this page.\n'
  const from = text.indexOf(begin)
  const to = text.indexOf(end)
  const next = from === -1 || to === -1 ? `${text.trimEnd()}\n\n${section}\n` : text.slice(0, from) + section + text.slice(to + end.length)
  writeFileSync(file, next)
}
