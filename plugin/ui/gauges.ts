import { setMaxListeners } from 'node:events'
import type { AdapterNode, CallSignal } from '../../adapters/adapter.ts'
import { TimeLimit } from '../../adapters/abort.ts'
import { send } from '../../adapters/http.ts'
import { readWhole } from '../../adapters/http/failures.ts'
import type { Gateway } from '../gateway.ts'

/** What a node says of itself by its /metrics; what it does not say is missing. */
export interface Gauges {
  readonly waiting?: number
  readonly running?: number
  /** Shares of 1: KV blocks or tokens that requests use; feature blocks that hold features. */
  readonly kv?: number
  readonly features?: number
}

interface Known { gauges: Gauges | undefined, silent: number, asking: boolean }

const INTERVAL_MS = 2_000
const TIMEOUT_MS = 1_500
const MAX_BYTES = 2 * 1024 * 1024
/** A node without metrics is asked in every so many rounds. */
const SELDOM = 15
const NAME = /^[a-zA-Z_:][\w:]*/

/** By the name of the metric, in the words of vLLM, SGLang, LMDeploy. Series of one name are added up; of shares the highest counts. */
const COUNTS: ReadonlyMap<string, 'waiting' | 'running'> = new Map([
  ['vllm:num_requests_waiting', 'waiting'],
  ['vllm:num_requests_running', 'running'],
  ['sglang:num_queue_reqs', 'waiting'],
  ['sglang:num_running_reqs', 'running'],
  ['lmdeploy:num_requests_waiting', 'waiting'],
  ['lmdeploy:num_requests_running', 'running']
])
const SHARES: ReadonlySet<string> = new Set(['vllm:kv_cache_usage_perc', 'vllm:gpu_cache_usage_perc', 'sglang:token_usage', 'lmdeploy:gpu_cache_usage_perc'])
const OURS = /^epd_(sequences|(?:kv|feature)_blocks_(?:capacity|free|cached))$/

/** Asks the nodes for their queues and caches, every two seconds while a page is open. */
export class NodeGauges {
  readonly #gateway: Gateway
  readonly #known = new Map<string, Known>()
  #timer: NodeJS.Timeout | undefined
  #calls = new AbortController()

  constructor (gateway: Gateway) {
    this.#gateway = gateway
  }

  start (): void {
    if (this.#timer !== undefined) return
    this.#calls = new AbortController()
    // A listener for each node that is being asked.
    setMaxListeners(0, this.#calls.signal)
    this.#timer = setInterval(() => { this.#round() }, INTERVAL_MS).unref()
    this.#round()
  }

  /** What was known is old when the next page is opened. */
  stop (): void {
    clearInterval(this.#timer)
    this.#timer = undefined
    this.#calls.abort()
    this.#known.clear()
  }

  of (id: string): Gauges | undefined {
    return this.#known.get(id)?.gauges
  }

  #round (): void {
    const { nodes, byId } = this.#gateway.registry.snapshot()
    for (const id of this.#known.keys()) if (!byId.has(id)) this.#known.delete(id)
    for (const node of nodes) {
      let known = this.#known.get(node.id)
      if (known === undefined) this.#known.set(node.id, known = { gauges: undefined, silent: 0, asking: false })
      if (node.state === 'unknown' || node.state === 'unhealthy') known.gauges = undefined
      else if (!known.asking && known.silent-- <= 0) this.#ask(node, known, this.#calls.signal).catch(() => {})
    }
  }

  async #ask (node: AdapterNode, known: Known, signal: CallSignal): Promise<void> {
    known.asking = true
    const limit = new TimeLimit(TIMEOUT_MS, signal)
    try {
      const { dispatcher, log } = this.#gateway
      const { statusCode, body } = await send(node, { method: 'GET', path: '/metrics', idempotent: true }, { signal: limit, headers: {}, dispatcher, log })
      const bytes = await readWhole(body, MAX_BYTES)
      known.gauges = statusCode === 200 && bytes !== undefined ? readGauges(bytes.toString()) : undefined
    } catch {
      // A node that fails is the registry's to say.
      known.gauges = undefined
    } finally {
      limit.clear()
      known.asking = false
      known.silent = known.gauges === undefined ? SELDOM : 0
    }
  }
}

/** @returns undefined when there is nothing in the text that the page shows */
export function readGauges (text: string): Gauges | undefined {
  const sums: { waiting?: number, running?: number } = {}
  const blocks: Record<string, number> = {}
  let kv: number | undefined
  const add = (what: 'waiting' | 'running', value: number): void => { sums[what] = (sums[what] ?? 0) + value }
  for (const line of text.split('\n')) {
    const name = NAME.exec(line)?.[0] ?? ''
    const count = COUNTS.get(name)
    const share = SHARES.has(name)
    if (count === undefined && !share && !OURS.test(name)) continue
    const value = valueOf(line, name)
    if (value === undefined) continue
    if (count !== undefined) add(count, value)
    else if (share) kv = Math.min(1, Math.max(kv ?? 0, value))
    else if (name === 'epd_sequences') add(line.includes('status="waiting"') ? 'waiting' : 'running', value)
    else blocks[name] = value
  }
  const { epd_kv_blocks_capacity: kvs = 0, epd_kv_blocks_free: kvFree = 0, epd_kv_blocks_cached: kvCached = 0, epd_feature_blocks_capacity: features = 0, epd_feature_blocks_free: free = 0 } = blocks
  if (kvs > 0) kv = Math.max(0, 1 - (kvFree + kvCached) / kvs)
  const found: Gauges = { ...sums, ...(kv === undefined ? {} : { kv }), ...(features > 0 ? { features: Math.max(0, 1 - free / features) } : {}) }
  return Object.keys(found).length === 0 ? undefined : found
}

/** The number behind name and labels; undefined when it is none that a gauge of these may have. */
function valueOf (line: string, name: string): number | undefined {
  const labels = line.lastIndexOf('}')
  const [text = ''] = line.slice(labels === -1 ? name.length : labels + 1).trim().split(/\s/, 1)
  const value = text === '' ? NaN : Number(text)
  return value >= 0 && value < 1e12 ? value : undefined
}
