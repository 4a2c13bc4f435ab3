/** The addresses of a name, asked for again when their time to live is over. */
import { promises, type RecordWithTtl } from 'node:dns'
import { readFileSync } from 'node:fs'
import { isDeepStrictEqual } from 'node:util'
import type { Log } from '../../adapters/adapter.ts'
import type { Found, Give } from './found.ts'

/** Bounds of the time to live, and what SRV records have, whose own Node.js does not tell. Milliseconds. */
const [MIN_TTL, MAX_TTL, SRV_TTL] = [1_000, 300_000, 30_000]
/** After an answer that failed; it doubles. Milliseconds. */
const [RETRY_MS, MAX_RETRY_MS] = [1_000, 30_000]

interface Answer {
  readonly found: readonly Found[]
  readonly ttl: number
}

interface DnsSource {
  readonly dns: string
  /** Undefined: the records have it. */
  readonly port: number | undefined
  readonly server: string | undefined
}

/** @returns ends it */
export function followDns (source: DnsSource, log: Log, give: Give): () => void {
  const ending = new AbortController()
  const resolver = new promises.Resolver({ timeout: 2_000, tries: 2 })
  if (source.server !== undefined) resolver.setServers([source.server])
  let last: readonly Found[] | undefined
  let retry = RETRY_MS
  let timer: NodeJS.Timeout | undefined

  const look = async (): Promise<void> => {
    let wait: number
    try {
      const { found, ttl } = await answerOf(resolver, source)
      if (ending.signal.aborted) return
      wait = Math.min(MAX_TTL, Math.max(MIN_TTL, ttl))
      retry = RETRY_MS
      if (!isDeepStrictEqual(found, last)) give(last = found)
    } catch (err) {
      if (ending.signal.aborted) return
      log.warn({ dns: source.dns, reason: (err as NodeJS.ErrnoException).code ?? String(err) }, 'a name was not found: the nodes stay that it had')
      wait = retry
      retry = Math.min(2 * retry, MAX_RETRY_MS)
    }
    timer = setTimeout(look, wait)
  }
  look()
  return () => {
    ending.abort()
    clearTimeout(timer)
    resolver.cancel()
  }
}

async function answerOf (resolver: promises.Resolver, { dns, port, server }: DnsSource): Promise<Answer> {
  let missing: unknown
  for (const name of server === undefined ? names(dns) : [dns]) {
    try {
      return await (port === undefined ? services(resolver, name) : addresses(resolver, name, port))
    } catch (err) {
      if (!isMissing(err)) throw err
      missing = err
    }
  }
  throw missing
}

async function services (resolver: promises.Resolver, name: string): Promise<Answer> {
  // The root as host says that there is no such service.
  const records = (await resolver.resolveSrv(name)).filter(({ name, port }) => name !== '' && name !== '.' && port > 0)
  if (records.length === 0) throw Object.assign(new Error(`${name} has no service`), { code: promises.NODATA })
  return together(await thereOf(records.map(async ({ name, port }) => await addresses(resolver, name, port))), SRV_TTL)
}

/** Of hosts or families of addresses some may be missing: that of a pod which has just gone, say. @throws where all are, or one was not answered */
async function thereOf (answers: ReadonlyArray<Promise<Answer>>): Promise<Answer[]> {
  const settled = await Promise.allSettled(answers)
  const failures = settled.flatMap(result => result.status === 'rejected' ? [result.reason as unknown] : [])
  const failed = failures.find(reason => !isMissing(reason)) ?? (failures.length === settled.length ? failures[0] : undefined)
  if (failed !== undefined) throw failed
  return settled.flatMap(result => result.status === 'fulfilled' ? [result.value] : [])
}

/** @throws where there is neither an A nor an AAAA record */
async function addresses (resolver: promises.Resolver, name: string, port: number): Promise<Answer> {
  const of = async (records: Promise<RecordWithTtl[]>): Promise<Answer> => {
    const found = await records
    return together(found.map(({ address, ttl }) => ({ found: [{ host: address, port }], ttl: 1_000 * ttl })), MAX_TTL)
  }
  return together(await thereOf([of(resolver.resolve4(name, { ttl: true })), of(resolver.resolve6(name, { ttl: true }))]), MAX_TTL)
}

/** Each once, though several records may name one host. In an order of its own: servers turn theirs with each answer. */
function together (answers: readonly Answer[], most: number): Answer {
  const all = new Map(answers.flatMap(({ found }) => found).map(found => [`${found.host} ${found.port}`, found]))
  return { found: [...all].sort(([a], [b]) => a < b ? -1 : 1).map(([, found]) => found), ttl: Math.min(most, ...answers.map(({ ttl }) => ttl)) }
}

/** The name is not there, or has no such record. */
function isMissing (err: unknown): boolean {
  const { code } = err as NodeJS.ErrnoException
  return code === promises.NOTFOUND || code === promises.NODATA
}

/** The names that the system would try: `encoder.vlm.svc` is short for `encoder.vlm.svc.cluster.local` in a pod. */
export function names (name: string, file = '/etc/resolv.conf'): string[] {
  if (name.endsWith('.')) return [name]
  let text = ''
  try { text = readFileSync(file, 'utf8') } catch {}
  const search = /^search\s+(.+)$/m.exec(text)?.[1]!.trim().split(/\s+/) ?? []
  const dots = Number(/^options\b.*\bndots:(\d+)/m.exec(text)?.[1] ?? 1)
  const long = search.map(domain => `${name}.${domain}`)
  return name.split('.').length > dots ? [name, ...long] : [...long, name]
}
