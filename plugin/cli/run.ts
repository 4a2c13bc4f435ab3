/** The commands. Each has a file, which is loaded only when it runs. */
import { VERSION } from '../../adapters/wire/version.ts'
import { clean } from './terminal.ts'

const HELP = `fastify-epd ${VERSION}: EPD routing for vision-language models

Usage: fastify-epd <command> [options]

Commands:
  serve    start the gateway, with embedded engines when no nodes are configured
  engine   start one reference engine (encoder or language model)
  demo     start gateway and engines, ask about a sample picture, show the stages
  trace    show the last (or a given) request's stages as a waterfall
  nodes    the nodes of a running gateway: list, add, remove, drain
  top      nodes and rates of a running gateway, live
  doctor   which nodes can work together, what they can serve, and what is missing
  bench    send a load of pictures and text to any OpenAI-compatible server, and measure it

fastify-epd <command> --help lists a command's options.
`

type Command = (argv: string[]) => Promise<number>

const COMMANDS: Readonly<Record<string, () => Promise<Command>>> = {
  serve: async () => (await import('./serve.ts')).serveCommand,
  engine: async () => (await import('./engine.ts')).engineCommand,
  demo: async () => (await import('./demo.ts')).demoCommand,
  trace: async () => (await import('./trace.ts')).traceCommand,
  nodes: async () => (await import('./nodes.ts')).nodesCommand,
  top: async () => (await import('./top/command.ts')).topCommand,
  doctor: async () => (await import('./doctor/command.ts')).doctorCommand,
  bench: async () => (await import('./bench/command.ts')).benchCommand
}

/** Runs a command to its end, and resolves with the exit code. Never rejects. */
export async function run (argv: string[]): Promise<number> {
  try {
    return await start(argv)
  } catch (err) {
    const message = err instanceof Error ? err.message : String(err)
    // A worker's error comes as text.
    const remedy = message.includes(' EADDRINUSE') ? ': the port is taken; --port names another one (0: any that is free)' : ''
    process.stderr.write(`fastify-epd: ${message.split('\n').map(clean).join('\n')}${remedy}\n`)
    return 1
  }
}

async function start ([name, ...argv]: string[]): Promise<number> {
  if (name === undefined || name === '--help' || name === '-h' || name === 'help') {
    process.stdout.write(HELP)
    return name === undefined ? 2 : 0
  }
  if (name === '--version' || name === '-v') {
    process.stdout.write(VERSION + '\n')
    return 0
  }
  const load = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined
  if (load === undefined) {
    process.stderr.write(`fastify-epd: unknown command '${name}'; commands are ${Object.keys(COMMANDS).join(', ')}\n`)
    return 2
  }
  return (await load())(argv)
}
