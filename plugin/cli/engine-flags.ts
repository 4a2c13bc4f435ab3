import { readFile, stat } from 'node:fs/promises'
import { resolve } from 'node:path'
import type { StartEngineOptions } from '../../engines/server/index.ts'
import { httpUrl, levelOf, oneOf, parseFlags, portOf, UsageError, whole } from './usage.ts'

export const ENGINE_HELP = `fastify-epd engine: one reference engine as an OpenAI-compatible server

Usage: fastify-epd engine --role ROLE [options]

What it runs:
  --role ROLE                 what the engine does with a request (required)
                                encoder  encodes pictures; other engines pull the features
                                hybrid   prefills and decodes
                                prefill  prefills, samples the first token, keeps the KV blocks for a decode engine
                                decode   pulls the KV blocks of a prefill engine and generates the rest
  --backend BACKEND           pytorch or turbomind, which has the role hybrid only (default: pytorch)
  --model DIR                 model folder (default: the shipped tiny model); see docs/models.md
  --served-model-name NAME    name in /v1/models (default: the folder's)
  --no-vision                 hybrid and prefill: do not open the vision encoder, take pictures as encoder results only
                                (decode never opens it: its KV blocks contain the pictures)

Where:
  --host HOST                 address to listen on, for HTTP and the P2P link (default: 127.0.0.1)
  --port PORT                 port to listen on, 0 takes a free one (default: 0)
  --public-url URL            URL by which others reach it, and its engine id (default: http://HOST:PORT)
  --proxy-url URL             gateway to register with, and to send spans to
  --api-key KEY               ask for this bearer token (or environment EPD_ENGINE_API_KEY)

How:
  --device DEVICE             cpu, cuda or cuda:N (default: cpu)
  --threads N                 threads of each session (default: this engine's share of the cores)
  --sharing N                 engines that share this machine's cores (default: 1)
  --max-batch-size N          items per encoder run, or sequences per decoder run (turbomind: slots)
  --max-queue N               requests that may wait for room; further ones are answered 503
  --feature-blocks N          feature blocks in the pool
  --kv-blocks N               KV blocks in the pool (turbomind: slots; those beyond --max-batch-size keep idle sessions)
  --block-size N              tokens per KV block; equal in engines that exchange KV blocks (default: 16)
  --max-prefill-token-num N   prompt tokens of one prefill step (default: 256)
  --session-len N             turbomind only: tokens a slot has room for, prompt and answer together
  --lease-seconds N           how long a consumer may take to pull what was encoded or prefilled for it (default: 60)

Pictures:
  --allow-private-media       fetch http(s) URLs that resolve to private addresses
  --allowed-media-domains A,B only from these hosts
  --media-dir DIR             allow file:// URLs below this folder

P2P keys (Z85 text in files; give both):
  --curve-public-key-file F   this engine's public key
  --curve-secret-key-file F   this engine's secret key
  --curve-allowed-keys-file F public keys of peers that may connect, one a line

Life:
  --grace-seconds N           at SIGTERM, time for requests in flight to finish (default: 10)
  --exit-with-parent          end when stdin closes
  --log-level LEVEL           trace, debug, info, warn, error or silent (default: info; logs go to stderr)
  -h, --help                  this text

Prints 'listening on URL' on stdout when it is ready for requests.
Exit code: 0 ended as asked, 1 failed, 2 called wrongly.
`

const FLAGS = {
  role: { type: 'string' },
  backend: { type: 'string', default: 'pytorch' },
  model: { type: 'string' },
  'served-model-name': { type: 'string' },
  'no-vision': { type: 'boolean', default: false },
  host: { type: 'string', default: '127.0.0.1' },
  port: { type: 'string', default: '0' },
  'public-url': { type: 'string' },
  'proxy-url': { type: 'string' },
  'api-key': { type: 'string' },
  device: { type: 'string', default: 'cpu' },
  threads: { type: 'string' },
  sharing: { type: 'string' },
  'max-batch-size': { type: 'string' },
  'max-queue': { type: 'string' },
  'feature-blocks': { type: 'string' },
  'kv-blocks': { type: 'string' },
  'block-size': { type: 'string' },
  'max-prefill-token-num': { type: 'string' },
  'session-len': { type: 'string' },
  'lease-seconds': { type: 'string' },
  'allow-private-media': { type: 'boolean', default: false },
  'allowed-media-domains': { type: 'string' },
  'media-dir': { type: 'string' },
  'curve-public-key-file': { type: 'string' },
  'curve-secret-key-file': { type: 'string' },
  'curve-allowed-keys-file': { type: 'string' },
  'grace-seconds': { type: 'string', default: '10' },
  'exit-with-parent': { type: 'boolean', default: false },
  'log-level': { type: 'string', default: 'info' },
  help: { type: 'boolean', short: 'h', default: false }
} as const

const ROLES = ['encoder', 'hybrid', 'prefill', 'decode'] as const
const BACKENDS = ['pytorch', 'turbomind'] as const
/** zeromq's keys as text. */
const Z85_KEY = /^[0-9a-zA-Z.\-:+=^!/*?&<>()[\]{}@%$#]{40}$/
const WILDCARD_HOSTS = new Set(['0.0.0.0', '::'])

type Values = ReturnType<typeof parseFlags<{ options: typeof FLAGS, args: string[] }>>['values']

export interface EngineFlags {
  readonly start: Omit<StartEngineOptions, 'modelDir'> & { readonly modelDir?: string | undefined }
  readonly graceSeconds: number
  readonly exitWithParent: boolean
}

/**
 * Reads and checks the flags. Undefined: the user asked for help.
 * @throws UsageError naming the flag and what it takes
 */
export async function engineOptions (argv: string[]): Promise<EngineFlags | undefined> {
  const { values } = parseFlags({ args: argv, options: FLAGS })
  if (values.help) return undefined
  const role = oneOf('--role', values.role, ROLES)
  const start = {
    role,
    backend: oneOf('--backend', values.backend, BACKENDS),
    modelDir: values.model === undefined ? undefined : await folder('--model', values.model),
    servedModelName: values['served-model-name'],
    vision: !values['no-vision'],
    ...network(values),
    device: deviceOf(values.device),
    ...sizes(values),
    leaseMs: scaled(whole('--lease-seconds', values['lease-seconds'], 1, 86_400), 1_000),
    ...await curve(values),
    media: await media(values),
    logger: { level: levelOf('--log-level', values['log-level']), stream: process.stderr }
  }
  checkBackend(start)
  checkRole(start)
  return { start, graceSeconds: whole('--grace-seconds', values['grace-seconds'], 0, 3_600) ?? 0, exitWithParent: values['exit-with-parent'] }
}

/** Refuses flags without effect for the backend. */
function checkBackend ({ backend, blockSize, sessionLen }: Pick<StartEngineOptions, 'backend' | 'blockSize' | 'sessionLen'>): void {
  if (backend === 'turbomind' && blockSize !== undefined) throw new UsageError('--block-size is for --backend pytorch: a TurboMind slot is one piece, as long as --session-len')
  if (backend === 'pytorch' && sessionLen !== undefined) throw new UsageError('--session-len is for --backend turbomind')
}

/** Refuses flags without effect for the role. */
function checkRole ({ role, vision, featureBlocks }: Pick<StartEngineOptions, 'role' | 'vision' | 'featureBlocks'>): void {
  if (role === 'encoder' && !vision) throw new UsageError('--no-vision makes no sense with --role encoder')
  if (role !== 'decode') return
  if (!vision) throw new UsageError('--no-vision makes no sense with --role decode, which never opens the vision encoder')
  if (featureBlocks !== undefined) throw new UsageError('--feature-blocks makes no sense with --role decode: it takes KV blocks, no features')
}

function network (values: Values): Pick<StartEngineOptions, 'host' | 'port' | 'publicUrl' | 'proxyUrl' | 'apiKey'> {
  const { host, 'public-url': publicUrl, 'proxy-url': proxyUrl } = values
  if (proxyUrl !== undefined && publicUrl === undefined && WILDCARD_HOSTS.has(host)) {
    throw new UsageError(`--host ${host} can't be dialled by others: give --public-url too, the URL to register`)
  }
  return {
    host,
    port: portOf('--port', values.port),
    publicUrl: publicUrl === undefined ? undefined : httpUrl('--public-url', publicUrl),
    proxyUrl: proxyUrl === undefined ? undefined : httpUrl('--proxy-url', proxyUrl),
    apiKey: values['api-key'] ?? (process.env.EPD_ENGINE_API_KEY || undefined)
  }
}

function sizes (values: Values): Pick<StartEngineOptions, 'threads' | 'sharing' | 'maxBatchSize' | 'maxQueue' | 'featureBlocks' | 'kvBlocks' | 'blockSize' | 'maxPrefillTokens' | 'sessionLen'> {
  return {
    threads: whole('--threads', values.threads, 1, 1_024),
    sharing: whole('--sharing', values.sharing, 1, 1_024),
    maxBatchSize: whole('--max-batch-size', values['max-batch-size'], 1, 4_096),
    maxQueue: whole('--max-queue', values['max-queue'], 0, 1_000_000),
    featureBlocks: whole('--feature-blocks', values['feature-blocks'], 1, 1_000_000),
    kvBlocks: whole('--kv-blocks', values['kv-blocks'], 1, 1_000_000),
    blockSize: whole('--block-size', values['block-size'], 1, 4_096),
    maxPrefillTokens: whole('--max-prefill-token-num', values['max-prefill-token-num'], 1, 1_000_000),
    sessionLen: whole('--session-len', values['session-len'], 16, 10_000_000)
  }
}

async function media (values: Values): Promise<StartEngineOptions['media']> {
  const domains = (values['allowed-media-domains'] ?? '').split(',').map(name => name.trim().toLowerCase()).filter(name => name !== '')
  const directory = values['media-dir']
  return {
    allowPrivate: values['allow-private-media'],
    allowedDomains: domains,
    directory: directory === undefined ? undefined : await folder('--media-dir', directory)
  }
}

async function curve (values: Values): Promise<Pick<StartEngineOptions, 'curve' | 'allowedPeers'>> {
  const [publicFile, secretFile, peersFile] = [values['curve-public-key-file'], values['curve-secret-key-file'], values['curve-allowed-keys-file']]
  if (publicFile === undefined && secretFile === undefined) {
    if (peersFile !== undefined) throw new UsageError('--curve-allowed-keys-file needs --curve-public-key-file and --curve-secret-key-file')
    return {}
  }
  if (publicFile === undefined || secretFile === undefined) throw new UsageError('--curve-public-key-file and --curve-secret-key-file go together')
  const [publicKey] = await keys('--curve-public-key-file', publicFile)
  const [secretKey] = await keys('--curve-secret-key-file', secretFile)
  const allowedPeers = peersFile === undefined ? undefined : await keys('--curve-allowed-keys-file', peersFile)
  return { curve: { publicKey: publicKey!, secretKey: secretKey! }, allowedPeers }
}

/** Messages never quote the file, which may hold a secret key. */
async function keys (flag: string, file: string): Promise<string[]> {
  const text = await readFile(file, 'utf8').catch((err: NodeJS.ErrnoException) => { throw new UsageError(`${flag}: can't read ${file} (${err.code ?? err.message})`) })
  const lines = text.split('\n').map(line => line.trim()).filter(line => line !== '')
  if (lines.length === 0 || !lines.every(line => Z85_KEY.test(line))) throw new UsageError(`${flag}: ${file} must hold keys of 40 Z85 characters, one a line`)
  return lines
}

async function folder (flag: string, dir: string): Promise<string> {
  const found = await stat(dir).catch(() => undefined)
  if (found?.isDirectory() !== true) throw new UsageError(`${flag}: no such folder: ${dir}`)
  return resolve(dir)
}

function deviceOf (value: string): string {
  if (/^(cpu|cuda(:\d{1,2})?)$/.test(value)) return value
  throw new UsageError(`--device must be cpu, cuda or cuda:N, not '${value}'`)
}

function scaled (value: number | undefined, by: number): number | undefined {
  return value === undefined ? undefined : value * by
}
