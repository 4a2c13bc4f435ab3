/** What commands write to a terminal. */

const DEFAULT_WIDTH = 120
const DEFAULT_HEIGHT = 40
const TICK_MS = 250
const NUMBER = /^\d[\d.,]*( ?(ms|s|%|MiB|GiB|\/s))?$/

/** Colour and width of the terminal on stdout. */
export function terminal (): { width: number, color: boolean } {
  const { isTTY, columns } = process.stdout
  return { width: columns ?? DEFAULT_WIDTH, color: isTTY === true && !process.env.NO_COLOR }
}

// eslint-disable-next-line no-control-regex
const CONTROLS = /[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]/g

/** Without control characters and marks that turn the direction of text: what comes from a network may have them, and a terminal obeys them. */
export function clean (text: string): string {
  return text.replace(CONTROLS, ' ')
}

/** JSON with its line end, that a terminal may show: JSON itself escapes only the first 32 control characters. @param indent spaces; without them it is one line */
export function jsonText (value: unknown, indent?: number): string {
  return JSON.stringify(value, null, indent).replace(CONTROLS, char => char === '\n' ? char : `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`) + '\n'
}

/** Rows in columns, without control characters. A column of numbers, with or without a unit, stands at the right, also below a head. */
export function table (rows: ReadonlyArray<readonly string[]>): string {
  const shown = rows.map(row => row.map(clean))
  const columns = Array.from({ length: Math.max(...shown.map(row => row.length)) }, (_, i) => {
    const cells = shown.map(row => row[i] ?? '')
    const values = (cells.length > 1 ? cells.slice(1) : cells).filter(cell => cell !== '' && cell !== '-')
    return { width: Math.max(...cells.map(cell => cell.length)), numbers: i > 0 && values.length > 0 && values.every(cell => NUMBER.test(cell)) }
  })
  return shown.map(row => row.map((cell, i) => {
    const { width, numbers } = columns[i]!
    return numbers ? cell.padStart(width) : cell.padEnd(width)
  }).join('  ').trimEnd() + '\n').join('')
}

/** Milliseconds as people read them. */
export function duration (ms: number): string {
  if (ms >= 10_000) return `${(ms / 1_000).toFixed(1)} s`
  return ms >= 100 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(ms >= 10 ? 1 : 2)} ms`
}

/** A line that is written again and again on a terminal; elsewhere, such as in a pipe or a log, nothing. */
export class ProgressLine {
  readonly #stream: NodeJS.WriteStream
  readonly #interval: number
  #shown = false
  #last = -Infinity

  /** @param interval milliseconds between two writings, at least */
  constructor (stream: NodeJS.WriteStream = process.stderr, interval = 200) {
    this.#stream = stream
    this.#interval = interval
  }

  update (text: string): void {
    const now = performance.now()
    if (this.#stream.isTTY !== true || now - this.#last < this.#interval) return
    this.#last = now
    this.#shown = true
    // The cursor stands at the beginning: a line of the log that comes between goes over it.
    this.#stream.write(`\r\x1b[K${clean(text).slice(0, Math.max(1, (this.#stream.columns ?? DEFAULT_WIDTH) - 1))}\r`)
  }

  /** Takes the line away. */
  clear (): void {
    if (this.#shown) this.#stream.write('\r\x1b[K')
    this.#shown = false
    this.#last = -Infinity
  }
}

/** Shows on a terminal for how long something has been under way, until the function that it returns is called. */
export function ticking (text: (seconds: number) => string, stream: NodeJS.WriteStream = process.stderr): () => void {
  if (stream.isTTY !== true) return () => {}
  const started = performance.now()
  const line = new ProgressLine(stream, 0)
  const tick = (): void => { line.update(text(Math.floor((performance.now() - started) / 1_000))) }
  const timer = setInterval(tick, TICK_MS).unref()
  tick()
  return () => {
    clearInterval(timer)
    line.clear()
  }
}

/** A picture that fills the terminal and is drawn again and again. What was there before comes back at `close`. */
export class Screen {
  readonly #stream: NodeJS.WriteStream

  constructor (stream: NodeJS.WriteStream) {
    this.#stream = stream
    stream.write('\x1b[?1049h\x1b[?25l')
  }

  show (text: string): void {
    const { columns = DEFAULT_WIDTH, rows = DEFAULT_HEIGHT } = this.#stream
    const lines = text.trimEnd().split('\n')
    const more = lines.length - rows + 1
    const shown = more > 0 ? [...lines.slice(0, rows - 2), `... and ${more + 1} lines more`] : lines
    // In place, line by line: a screen that is emptied first flickers.
    this.#stream.write('\x1b[H' + shown.map(line => `${clean(line).slice(0, columns)}\x1b[K\n`).join('') + '\x1b[J')
  }

  close (): void {
    this.#stream.write('\x1b[?25h\x1b[?1049l')
  }
}
