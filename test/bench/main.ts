/**
 * `npm run bench [-- NAME...] [--quick] [--write]`: runs the named benchmarks, or all, and prints Markdown.
 * `--write` also puts the results into docs/benchmarks.md.
 */
import { existsSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { machine, writeSection } from './report.ts'
import type { Bench, BenchContext } from './report.ts'

const NAMES = ['relay', 'body', 'e2e', 'overlap', 'topologies', 'policies', 'planner', 'overload', 'peers', 'transfer', 'encoder', 'llm', 'telemetry']

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { quick: { type: 'boolean', default: false }, write: { type: 'boolean', default: false }, seconds: { type: 'string' }, workers: { type: 'string' }, help: { type: 'boolean', short: 'h', default: false } }
})

const urlOf = (name: string): URL => new URL(`./${name}.js`, import.meta.url)
const available = NAMES.filter(name => existsSync(urlOf(name)))

if (values.help) {
  console.log(`npm run bench [-- NAME...] [--quick] [--write]\n\nbenchmarks: ${available.join(', ')}\n\nof peers: --seconds S for each figure, --workers 1,2,4,8 cores of a router`)
} else {
  const unknown = positionals.filter(name => !available.includes(name))
  if (unknown.length > 0) {
    console.error(`no such benchmark: ${unknown.join(', ')}; there are ${available.join(', ')}`)
    process.exitCode = 2
  } else await runAll(positionals.length > 0 ? positionals : available)
}

async function runAll (names: readonly string[]): Promise<void> {
  const context: BenchContext = {
    quick: values.quick,
    rounds: values.quick ? 2 : 5,
    seconds: values.seconds === undefined ? undefined : Number(values.seconds),
    workers: values.workers?.split(',').map(Number),
    log: line => { process.stderr.write(`${line}\n`) }
  }
  console.log(`Measured on: ${machine()}${values.quick ? ' (quick run: rough figures)' : ''}\n`)
  for (const name of names) {
    const bench = await import(urlOf(name).href) as Bench
    context.log(`${name} ...`)
    try {
      const markdown = await bench.run(context)
      console.log(`${markdown}\n`)
      if (values.write) writeSection(name, `${markdown}\n\nMeasured on: ${machine()}${values.quick ? ' (quick run of two rounds: rough figures)' : ''}`)
    } catch (error) {
      console.error(`${name}: ${error instanceof Error ? error.stack : String(error)}`)
      process.exitCode = 1
    }
  }
}
