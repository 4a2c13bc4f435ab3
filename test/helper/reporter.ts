/**
 * What `npm test` prints: one line a file as it ends, the failures at the end, then `N passed, N failed`. It gets
 * the whole run as TAP, from run.ts or from tap's own runner.
 */
import { Transform, type TransformCallback } from 'node:stream'
import { Parser, type FinalResults, type Result } from 'tap-parser'
import { stringify } from 'tap-yaml'

export default class Reporter extends Transform {
  readonly #parser = new Parser()
  readonly #failures: string[] = []
  /** Of the present file, then of all. */
  #file = { passed: 0, failed: 0, skipped: 0 }
  readonly #all = { passed: 0, failed: 0, skipped: 0 }

  constructor () {
    super({ encoding: 'utf8' })
    this.#parser.on('child', (file: Parser) => { this.#watch(file) })
    // The runner's own assertions are its files: each comes when all of the file is known, its exit code too.
    this.#parser.on('assert', (file: Result) => { this.#ended(file) })
  }

  /** Counts each assertion, but not the line that closes a subtest. */
  #watch (parser: Parser): void {
    let closing = false
    parser.on('child', (child: Parser) => {
      this.#watch(child)
      child.on('complete', (results: FinalResults) => { closing = results.count > 0 })
    })
    parser.on('assert', (result: Result) => {
      if (!closing) this.#count(result)
      closing = false
    })
  }

  #count (result: Result): void {
    if (result.skip) this.#file.skipped++
    else if (result.ok) this.#file.passed++
    else this.#fail(result.fullname, result)
  }

  #fail (name: string, { diag }: Result): void {
    this.#file.failed++
    const { source, at, ...rest } = diag ?? {}
    this.#failures.push(`FAILED  ${name}\n${stringify(rest).trimEnd().replace(/^/gm, '    ')}\n`)
  }

  #ended (file: Result): void {
    // A crash, a plan not met or a time-out fails a file without a failed assertion.
    if (!file.ok && this.#file.failed === 0) this.#fail(file.name, file)
    const { passed, failed, skipped } = this.#file
    this.push(`${failed === 0 ? 'ok    ' : 'FAILED'}  ${file.name}  ${counts(this.#file)}${file.time === null ? '' : `  ${(file.time / 1_000).toFixed(1)} s`}\n`)
    this.#all.passed += passed
    this.#all.failed += failed
    this.#all.skipped += skipped
    this.#file = { passed: 0, failed: 0, skipped: 0 }
  }

  override _transform (chunk: Buffer | string, _encoding: BufferEncoding, done: TransformCallback): void {
    this.#parser.write(chunk)
    done()
  }

  override _flush (done: TransformCallback): void {
    this.#parser.end()
    if (this.#failures.length > 0) this.push(`\n${this.#failures.join('\n')}\n`)
    this.push(`${counts(this.#all)}\n`)
    done()
  }
}

function counts ({ passed, failed, skipped }: { passed: number, failed: number, skipped: number }): string {
  return `${passed} passed, ${failed} failed${skipped === 0 ? '' : `, ${skipped} skipped`}`
}
