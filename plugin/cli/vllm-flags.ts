/** The flags of vLLM's example proxy, disagg_epd_proxy.py, so that its command line starts this gateway. */
import type { EpdOptions, NodeOptions } from '../options/index.ts'
import { httpUrl, UsageError } from './usage.ts'

export const VLLM_FLAGS = {
  'encode-servers-urls': { type: 'string' },
  'prefill-servers-urls': { type: 'string' },
  'decode-servers-urls': { type: 'string' },
  'decode-retries': { type: 'string' },
  'dynamic-registration': { type: 'boolean' },
  'probe-timeout': { type: 'string' },
  'log-requests': { type: 'boolean' },
  'no-rewrite': { type: 'boolean' },
  'probe-interval': { type: 'string' },
  'fail-threshold': { type: 'string' },
  'evicted-ttl': { type: 'string' },
  'ec-consumer-zmq-addrs': { type: 'string' },
  'ec-consumer-dp-size': { type: 'string' }
} as const

export type VllmFlags = { readonly [name in keyof typeof VLLM_FLAGS]?: (typeof VLLM_FLAGS)[name]['type'] extends 'boolean' ? boolean | undefined : string | undefined }

/** What the gateway does by itself, whatever the flag says. */
const NEEDLESS: ReadonlyArray<readonly [keyof VllmFlags, string]> = [
  ['probe-interval', 'the gateway probes a healthy node every 5 s and an unhealthy one after 1 to 10 s'],
  ['fail-threshold', 'a failed request or probe takes a node out of use at once, and it comes back with the next good probe'],
  ['evicted-ttl', 'the gateway forgets a node only when it is removed']
]

export interface FromVllmFlags {
  readonly options: EpdOptions
  /** For people: which flags change nothing, and why. */
  readonly notes: readonly string[]
}

/** The configuration with what the flags say. Throws UsageError. */
export function withVllmFlags (options: EpdOptions, flags: VllmFlags, env: NodeJS.ProcessEnv): FromVllmFlags {
  const registration = flags['dynamic-registration'] === true
  const nodes = nodesOf(flags)
  if (registration && nodes.length > 0) throw new UsageError('with --dynamic-registration servers register through /instances; leave the *-servers-urls out')
  return {
    options: {
      ...options,
      ...(nodes.length > 0 ? { nodes: [...options.nodes ?? [], ...nodes] } : {}),
      ...(registration ? { embedded: false, adminKey: adminKey(env) } : {}),
      ...(flags['no-rewrite'] === true ? { vllm: { ...options.vllm, handoff: 'raw' } } : {}),
      ...(flags['decode-retries'] === undefined ? {} : { retries: Math.min(5, number('decode-retries', flags['decode-retries'])) }),
      ...(flags['probe-timeout'] === undefined ? {} : { timeouts: { ...options.timeouts, probe: Math.ceil(number('probe-timeout', flags['probe-timeout']) * 1000) } })
    },
    notes: NEEDLESS.filter(([flag]) => flags[flag] !== undefined).map(([flag, why]) => `--${flag} changes nothing: ${why}`)
  }
}

function nodesOf (flags: VllmFlags): NodeOptions[] {
  const encode = urlsOf('encode-servers-urls', flags)
  const decode = urlsOf('decode-servers-urls', flags)
  const off = ['disable', 'none', ''].includes((flags['prefill-servers-urls'] ?? '').toLowerCase())
  const prefill = off ? [] : urlsOf('prefill-servers-urls', flags)
  if (encode.length + prefill.length + decode.length === 0) return []
  if (encode.length === 0 || decode.length === 0) throw new UsageError('give both --encode-servers-urls and --decode-servers-urls')
  const as = (urls: readonly string[], role: NonNullable<NodeOptions['role']>): NodeOptions[] => urls.map(url => ({ url, role, adapter: 'vllm' }))
  return [...as(encode, 'encoder'), ...as(prefill, 'prefill'), ...withReceivers(as(decode, prefill.length > 0 ? 'decode' : 'hybrid'), flags)]
}

/** The decode servers with the addresses that encoders push features to: those of the first server's replicas, then the second's. */
function withReceivers (servers: NodeOptions[], flags: VllmFlags): NodeOptions[] {
  const addresses = (flags['ec-consumer-zmq-addrs'] ?? '').split(',').map(address => address.trim()).filter(address => address !== '')
  if (addresses.length === 0) return servers
  const replicas = number('ec-consumer-dp-size', flags['ec-consumer-dp-size'] ?? '1')
  if (servers.some(server => server.role !== 'hybrid')) throw new UsageError('--ec-consumer-zmq-addrs is for decode servers that prefill, without --prefill-servers-urls')
  if (!Number.isInteger(replicas) || replicas < 1) throw new UsageError('--ec-consumer-dp-size must be a whole number of at least 1')
  if (addresses.length !== servers.length * replicas) throw new UsageError(`--ec-consumer-zmq-addrs must hold ${servers.length * replicas} addresses, one for each replica of each decode server, not ${addresses.length}`)
  return servers.map((server, i) => ({ ...server, ecZmqAddrs: addresses.slice(i * replicas, (i + 1) * replicas) }))
}

function urlsOf (flag: 'encode-servers-urls' | 'prefill-servers-urls' | 'decode-servers-urls', flags: VllmFlags): string[] {
  const urls = (flags[flag] ?? '').split(',').map(url => url.trim()).filter(url => url !== '')
  return urls.map(url => httpUrl(`--${flag}`, url))
}

function number (flag: string, value: string): number {
  const found = Number(value)
  if (value.trim() === '' || !Number.isFinite(found) || found < 0) throw new UsageError(`--${flag} must be a number of at least 0, not '${value}'`)
  return found
}

function adminKey ({ ADMIN_API_KEY: key }: NodeJS.ProcessEnv): string {
  if (key === undefined || key === '') throw new UsageError('--dynamic-registration needs the environment variable ADMIN_API_KEY')
  return key
}
