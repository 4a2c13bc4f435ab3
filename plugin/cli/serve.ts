import { once } from 'node:events'
import { startGateway } from './gateway-process.ts'
import { loadConfig } from './config.ts'
import { levelOf, parseFlags, portOf, withUsage } from './usage.ts'
import { VLLM_FLAGS, withVllmFlags } from './vllm-flags.ts'

const HELP = `fastify-epd serve: an OpenAI-compatible gateway with EPD routing

Usage: fastify-epd serve [options]

Options:
  --config FILE      configuration (default: epd.config.json, if it is there); see docs/options.md
  --host HOST        address to listen on (default: 127.0.0.1)
  --port PORT        port to listen on, 0 takes a free one (default: 8000)
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
Traces: GET /epd/traces, or fastify-epd trace. The standard OTEL_* variables export spans to an OTLP receiver.
`

const FLAGS = {
  config: { type: 'string' },
  host: { type: 'string', default: '127.0.0.1' },
  port: { type: 'string', default: '8000' },
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
    const config = await loadConfig(values.config)
    const { options, notes } = withVllmFlags(config.raw, values, process.env)
    for (const note of notes) process.stderr.write(note + '\n')
    const gateway = await startGateway({
      options,
      host: values.host,
      port: portOf('--port', values.port),
      logLevel: levelOf('--log-level', values['log-level'] ?? (values['log-requests'] === true ? 'debug' : 'info')),
      onProgress: line => { process.stderr.write(line + '\n') }
    })
    if (gateway.page !== undefined) process.stderr.write(`nodes, requests and their stages, live: ${gateway.page}\n`)
    process.stdout.write(`listening on ${gateway.url}\n`)
    await Promise.race([once(process, 'SIGTERM'), once(process, 'SIGINT')])
    process.once('SIGTERM', exitNow).once('SIGINT', exitNow)
    await gateway.close()
    return 0
  })
}

function exitNow (): never {
  process.exit(1)
}
