import { readFile } from 'node:fs/promises'
import { basename, extname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { startGateway, type GatewayProcess } from './gateway-process.ts'
import { terminal } from './terminal.ts'
import { fetchTrace } from './trace.ts'
import { parseFlags, UsageError, withUsage } from './usage.ts'
import { renderWaterfall } from './waterfall.ts'

const HELP = `fastify-epd demo: a question about a picture, encode -> prefill -> decode, with the stages and their times

Usage: fastify-epd demo [options]

Options:
  --image FILE       PNG, JPEG or WebP (default: a sample picture of the project)
  --question TEXT    default: 'How many red circles are there?' (docs/models.md lists what the model understands)
  --config FILE      configuration of the gateway (default: one encoder and one language model engine)
  -h, --help         this text
`

const MIME: Readonly<Record<string, string>> = { '.png': 'image/png', '.jpg': 'image/jpeg', '.jpeg': 'image/jpeg', '.webp': 'image/webp' }

/** `fastify-epd demo`. */
export function demoCommand (argv: string[]): Promise<number> {
  return withUsage('demo', async () => {
    const { values } = parseFlags({
      args: argv,
      options: {
        image: { type: 'string' },
        question: { type: 'string', default: 'How many red circles are there?' },
        config: { type: 'string' },
        help: { type: 'boolean', short: 'h', default: false }
      }
    })
    if (values.help) {
      process.stdout.write(HELP)
      return 0
    }
    const image = values.image ?? fileURLToPath(new URL('../../../docs/examples/shapes.png', import.meta.url))
    const picture = await dataUrl(image)
    return await show(picture, basename(image), values.question, values.config)
  })
}

async function show (picture: string, name: string, question: string, config: string | undefined): Promise<number> {
  const { loadConfig } = await import('./config.ts')
  const options = config === undefined ? { embedded: true } : (await loadConfig(config)).raw
  print('Starting a gateway and its engines')
  const started = performance.now()
  const gateway = await startGateway({ options: { ...options, server: { host: '127.0.0.1', port: 0 } }, logLevel: 'error', onProgress: line => { print('  ' + line) } })
  try {
    print(`  gateway    ${gateway.url}   (ready after ${seconds(performance.now() - started)})`)
    print('')
    print(`Picture    ${name}`)
    print(`Question   ${question}`)
    const answer = await ask(gateway, picture, question)
    print(`Answer     ${answer.text}`)
    print('')
    print(`Plan       ${answer.plan}: ${answer.reason}`)
    for (const encoder of answer.encoders) print(`Encoder    ${encoder}`)
    print('')
    const trace = await fetchTrace({ url: gateway.base, adminKey: gateway.adminKey }, answer.traceId)
    if (trace !== undefined) print(renderWaterfall(trace, terminal()))
    print('')
    print('Next: npm start keeps gateway and engines running, with a page that shows all this live; README.md has a first request to send.')
    return 0
  } finally {
    await gateway.close()
  }
}

interface Answer { readonly text: string, readonly plan: string, readonly reason: string, readonly encoders: string[], readonly traceId: string }

async function ask ({ base, apiKey }: GatewayProcess, picture: string, question: string): Promise<Answer> {
  const authorization: Record<string, string> = apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` }
  const response = await fetch(`${base}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...authorization },
    body: JSON.stringify({
      model: await firstModel(base, authorization),
      temperature: 0,
      messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: picture } }, { type: 'text', text: question }] }]
    })
  })
  const body = await response.json() as { choices?: Array<{ message: { content: string } }>, error?: { message: string } }
  const text = body.choices?.[0]?.message.content
  if (!response.ok || text === undefined) throw new Error(`the gateway answered ${response.status}: ${body.error?.message ?? JSON.stringify(body)}`)
  const header = (name: string): string => response.headers.get(name) ?? ''
  return {
    text,
    plan: header('x-epd-plan'),
    reason: header('x-epd-reason'),
    encoders: header('x-epd-encoders').split(',').filter(Boolean),
    traceId: header('x-epd-trace-id')
  }
}

async function firstModel (url: string, headers: Record<string, string>): Promise<string> {
  const { data } = await (await fetch(`${url}/v1/models`, { headers })).json() as { data: Array<{ id: string }> }
  if (data[0] === undefined) throw new Error('no node serves a model')
  return data[0].id
}

async function dataUrl (file: string): Promise<string> {
  const mime = MIME[extname(file).toLowerCase()]
  if (mime === undefined) throw new UsageError(`--image: ${file} is none of ${Object.keys(MIME).join(', ')}`)
  try {
    return `data:${mime};base64,${(await readFile(file)).toString('base64')}`
  } catch (err) {
    throw new UsageError(`--image: can't read ${file} (${(err as NodeJS.ErrnoException).code ?? String(err)})`)
  }
}

function seconds (ms: number): string {
  return `${(ms / 1000).toFixed(1)} s`
}

function print (line: string): void {
  process.stdout.write(line + '\n')
}
