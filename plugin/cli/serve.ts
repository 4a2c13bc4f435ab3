import { once } from 'node:events'
import { startGateway } from './gateway-process.ts'
import { loadConfig } from './config.ts'
import { hindrance } from '../embedded/supervisor.ts'
import { checkStateFile } from './state-file.ts'
import { tlsFiles } from './tls.ts'
import { resolveOptions, type EpdOptions } from '../options/index.ts'
import { levelOf, parseFlags, portOf, UsageError, withUsage } from './usage.ts'
import { VLLM_FLAGS, withVllmFlags, type FromVllmFlags } from './vllm-flags.ts'

const HELP = `fastify-epd serve: an OpenAI-compatible gateway with EPD routing

Usage: fastify-epd serve [options]

Options:
  --config FILE      configuration, as JSON or YAML (default: epd.config.json, .jsonc, .yaml or .yml, if it is there);
                     see docs/options.md
  --check            checks the configuration and ends: with 0 when it is good, else with 2 and what is wrong where
  --host HOST        address to listen on (default: server.host of the configuration, else 127.0.0.1)
  --port PORT        port to listen on, 0 takes a free one (default: server.port, else 8000)
  --workers N        processes that serve requests under this port (default: server.workers, else 1)
  --log-level LEVEL  trace, debug, info, warn, error or silent (default: info; logs go to stderr)
  -h, --help         this text

In place of vLLM's disagg_epd_proxy.py, with its flags (docs/vllm.md has the others):
  --encode-servers-urls URLS   encoders, comma-separated
  --prefill-servers-urls URLS  prefill servers, or 'disable'
  --decode-servers-urls URLS   decode servers; without prefill servers those that do both
  --dynamic-registration       servers register with POST /instances; the key is in ADMIN_API_KEY

Without nodes in the configuration it starts engines of its own, one encoder and one language model engine, with the
shipped tiny model. Prints 'listening on URL' on stdout when it is ready for requests.
On loopback (or with "ui": true) /epd/ is a page that shows nodes, requests and their stages, live.
SIGHUP and POST /epd/reload read the configuration again; requests in flight go on.
Traces: GET /epd/traces, or fastify-epd trace. The standard OTEL_* variables export spans to an OTLP receiver.
`

const FLAGS = {
  config: { type: 'string' },
  check: { type: 'boolean', default: false },
  host: { type: 'string' },
  port: { type: 'string' },
  workers: { type: 'string' },
  'log-level': { type: 'string' },
  ...VLLM_FLAGS,
  help: { type: 'boolean', short: 'h', default: false }
} as const

/** `fastify-epd serve`. Runs until SIGINT or SIGTERM; a second signal ends it at once. */
export function serveCommand (argv: string[]): Promise<number> {
  return withUsage('serve', async () => {
    const { values } = parseFlags({ args: argv, options: FLAGS })
    if (values.help) {
      process.stdout.write(HELP)
      return 0
    }
    const { file, raw } = await loadConfig(values.config)
    const withFlags = (raw: EpdOptions): FromVllmFlags => withVllmFlags(withAddress(raw, values), values, process.env)
    const { options, notes } = withFlags(raw)
    const { embedded, server: { workers } } = resolveOptions(options)
    const { why, folder } = (embedded && hindrance(embedded)) ?? {}
    if (why !== undefined) throw new UsageError([file, why, folder].filter(part => part !== undefined).join(': '))
    if (values.check) return await check(options, file)
    for (const note of notes) process.stderr.write(note + '\n')
    const init = {
      options,
      load: async () => withFlags((await loadConfig(values.config)).raw).options,
      logLevel: levelOf('--log-level', values['log-level'] ?? (values['log-requests'] === true ? 'debug' : 'info')),
      onProgress: (line: string) => { process.stderr.write(line + '\n') }
    }
    const gateway = workers === 1 ? await startGateway(init) : await (await import('./workers/primary.ts')).startWorkers(workers, init)
    if (gateway.page !== undefined) process.stderr.write(`nodes, requests and their stages, live: ${gateway.page}\n`)
    // Before the line that says it is ready: who has read it may send a signal.
    const ended = Promise.race([once(process, 'SIGTERM'), once(process, 'SIGINT')])
    process.stdout.write(`listening on ${gateway.url}\n`)
    await ended
    process.once('SIGTERM', exitNow).once('SIGINT', exitNow)
    await gateway.close()
    return 0
  })
}

/** The configuration with the flags that go before it. */
function withAddress (options: EpdOptions, { host, port, workers }: { host?: string | undefined, port?: string | undefined, workers?: string | undefined }): EpdOptions {
  const flags = { ...(host === undefined ? {} : { host }), ...(port === undefined ? {} : { port: portOf('--port', port) }), ...(workers === undefined ? {} : { workers: workersOf(workers) }) }
  return Object.keys(flags).length === 0 ? options : { ...options, server: { ...options.server, ...flags } }
}

function workersOf (text: string): number {
  const workers = Number(text)
  if (!/^\d+$/.test(text) || workers < 1 || workers > 64) throw new UsageError(`--workers must be a whole number from 1 to 64, not '${text}'`)
  return workers
}

/** Whatever else a start would trip over. */
async function check (options: EpdOptions, file: string | undefined): Promise<number> {
  const { nodes, server: { tls, stateFile } } = resolveOptions(options)
  if (tls !== undefined) tlsFiles(tls)
  if (stateFile !== undefined) checkStateFile(stateFile)
  process.stdout.write(`${file ?? 'no configuration file: the defaults'}: ok, ${nodes.length} node${nodes.length === 1 ? '' : 's'}\n`)
  return 0
}

function exitNow (): never {
  process.exit(1)
}
