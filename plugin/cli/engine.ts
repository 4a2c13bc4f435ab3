import { once } from 'node:events'
import { basename } from 'node:path'
import type { StartEngineOptions } from '../../engines/server/index.ts'
import { ENGINE_HELP, engineOptions, type EngineFlags } from './engine-flags.ts'
import { ticking } from './terminal.ts'
import { UsageError, withUsage } from './usage.ts'

type EngineServer = typeof import('../../engines/server/index.ts')

/**
 * `fastify-epd engine`: the main function of an engine process, and the one place in plugin/ that loads engines/. Runs
 * until SIGINT or SIGTERM (with --exit-with-parent, until its stdin closes), then lets requests in flight finish; a
 * second signal ends it at once.
 */
export function engineCommand (argv: string[]): Promise<number> {
  return withUsage('engine', async () => {
    const flags = await engineOptions(argv)
    if (flags === undefined) {
      process.stdout.write(ENGINE_HELP)
      return 0
    }
    // Listen before loading the model, so that a signal during loading ends the process too.
    const asked = endAsked(flags.exitWithParent)
    try {
      await run(flags, asked)
    } finally {
      // An open stdin would keep the process alive.
      process.stdin.destroy()
    }
    return 0
  })
}

async function run (flags: EngineFlags, asked: Promise<void>): Promise<void> {
  const server = await import('../../engines/server/index.ts')
  const options = complete(flags.start, server)
  const done = ticking(seconds => `loading ${basename(options.modelDir)}, ${seconds} s`)
  const started = await Promise.race([server.startEngine(options), asked.then(() => undefined)]).finally(done)
  // Loading can't be interrupted, and no request is in flight.
  if (started === undefined) process.exit(0)
  process.stdout.write(`listening on ${started.url}\n`)
  await asked
  process.once('SIGTERM', exitNow)
  if (!flags.exitWithParent) process.once('SIGINT', exitNow)
  started.log.info({}, 'ending: requests in flight finish first')
  await started.close(flags.graceSeconds * 1_000)
}

function complete (start: Omit<StartEngineOptions, 'modelDir'> & { modelDir?: string | undefined }, server: EngineServer): StartEngineOptions {
  const options = { ...start, modelDir: start.modelDir ?? server.shippedModel() }
  try {
    server.assertAvailable(options)
  } catch (err) {
    if (err instanceof server.NotAvailableError) throw new UsageError(err.message)
    throw err
  }
  return options
}

async function endAsked (withParent: boolean): Promise<void> {
  if (!withParent) {
    await Promise.race([once(process, 'SIGTERM'), once(process, 'SIGINT')])
    return
  }
  // Ctrl-C in a terminal reaches the whole process group; the parent drains first and then sends SIGTERM.
  process.on('SIGINT', () => {})
  process.stdin.on('error', () => {}).resume()
  await Promise.race([once(process, 'SIGTERM'), once(process.stdin, 'close')])
}

function exitNow (): never {
  process.exit(1)
}
