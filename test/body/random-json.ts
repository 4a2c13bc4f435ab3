import { mulberry32 } from '../helper/random.ts'

/** Repeatable random numbers, JSON values, and JSON texts with random white space and escapes. */
export class Random {
  readonly #next: () => number

  constructor (seed: number) {
    this.#next = mulberry32(seed)
  }

  /** An integer from 0 to `n - 1`. */
  below (n: number): number {
    return Math.floor(this.#next() / 2 ** 32 * n)
  }

  pick<T> (from: ArrayLike<T>): T {
    return from[this.below(from.length)]!
  }

  shuffle<T> (values: readonly T[]): T[] {
    const left = [...values]
    const result: T[] = []
    while (left.length > 0) result.push(...left.splice(this.below(left.length), 1))
    return result
  }

  string (): string {
    const length = this.below(10) === 0 ? this.below(400) : this.below(12)
    let text = ''
    for (let i = 0; i < length; i++) text += this.pick(['a', 'Z', '0', ' ', '"', '\\', '/', '\n', '\t', '{', '}', '[', ',', ':', '\u00e9', '\u20ac', '\u{1f600}', '\u0001', 'epd:'])
    return text
  }

  /** JSON text of a value with white space between tokens and some characters of strings escaped. */
  spaced (value: unknown): string {
    const gap = (): string => this.below(3) === 0 ? this.pick([' ', '\n', '\t', '\r\n', '   ']) : ''
    const escape = (text: string): string => '"' + JSON.stringify(text).slice(1, -1).replace(/(\\.)|([a-z/])/g, (match, escaped: string | undefined) => {
      if (escaped !== undefined || this.below(12) !== 0) return match
      return match === '/' ? '\\/' : `\\u00${match.charCodeAt(0).toString(16)}`
    }) + '"'
    const write = (item: unknown): string => {
      if (typeof item === 'string') return escape(item)
      if (typeof item !== 'object' || item === null) return JSON.stringify(item)
      if (Array.isArray(item)) return '[' + gap() + item.map(one => write(one) + gap()).join(',' + gap()) + ']'
      return '{' + gap() + Object.entries(item).map(([key, one]) => escape(key) + gap() + ':' + gap() + write(one) + gap()).join(',' + gap()) + '}'
    }
    return gap() + write(value) + gap()
  }
}

export function randomJson (random: Random, depth: number): unknown {
  switch (random.below(depth > 0 ? 8 : 6)) {
    case 0: return null
    case 1: return random.below(2) === 0
    case 2: return random.below(2000) - 1000
    case 3: return (random.below(2000) - 1000) / 7 * 10 ** (random.below(30) - 15)
    case 4:
    case 5: return random.string()
    case 6: return Array.from({ length: random.below(4) }, () => randomJson(random, depth - 1))
    default: return Object.fromEntries(Array.from({ length: random.below(4) }, (_, i) => [random.string() + i, randomJson(random, depth - 1)]))
  }
}
