import { setMaxListeners } from 'node:events'
import { AdapterError, type Call, type Link } from '../../adapters/adapter.ts'
import { abortable } from '../../adapters/abort.ts'
import type { NodeRecord } from './node.ts'
import { isUnspecified } from './node-url.ts'
import type { LinkState, LinkView, NodeSnapshot } from './types.ts'

export interface LinksOptions {
  /** A call for adapters, with this signal. */
  readonly call: (signal: AbortSignal) => Call
  readonly timeout: number
  readonly backoff: number
  readonly backoffMax: number
  readonly onChange: () => void
}

type Epochs = readonly [number | undefined, number | undefined]

class Pair {
  readonly from: NodeRecord
  readonly to: NodeRecord
  state: LinkState = 'none'
  reason: string | undefined
  link: Link | undefined
  /** Epochs the state belongs to, and lives of the ends, which count where there is no epoch. */
  epochs: Epochs = [undefined, undefined]
  lives: readonly [number, number] = [0, 0]
  attempt: Promise<Link> | undefined
  timer: NodeJS.Timeout | undefined
  delay: number

  constructor (from: NodeRecord, to: NodeRecord, delay: number) {
    this.from = from
    this.to = to
    this.delay = delay
  }

  get view (): LinkView {
    return Object.freeze({ from: this.from.id, to: this.to.id, state: this.state, reason: this.reason, link: this.link })
  }

  currentEpochs (): Epochs {
    return [this.from.info?.epoch, this.to.info?.epoch]
  }

  /** Is an end another process than the state belongs to? */
  get restarted (): boolean {
    return [this.from, this.to].some((end, i) => end.info?.epoch !== this.epochs[i] || (this.epochs[i] === undefined && end.lives !== this.lives[i]))
  }
}

/** What a pair's fitness depends on. */
type End = Pick<NodeSnapshot, 'role' | 'models' | 'info'>

/** What moves from one role to another: features to the node that prefills, KV blocks from P to D. */
function transferKind (from: End, to: End): 'features:' | 'kv:' | undefined {
  if (from.role === 'encoder') return to.role === 'prefill' || to.role === 'hybrid' ? 'features:' : undefined
  return from.role === 'prefill' && to.role === 'decode' ? 'kv:' : undefined
}

/** Do the two have a transfer format in common, and for KV blocks a model? Only linking them shows whether it works. */
export function canExchange (from: End, to: End): boolean {
  const kind = transferKind(from, to)
  if (kind === undefined || (kind === 'kv:' && !from.models.some(model => to.models.includes(model)))) return false
  const accepts = to.info?.accepts ?? []
  return (from.info?.produces ?? []).some(format => format.startsWith(kind) && accepts.includes(format))
}

/** False when both report a fingerprint and these differ. */
export function sameFingerprint (from: End, to: End): boolean {
  const [one, other] = [from.info?.fingerprint, to.info?.fingerprint]
  return one === undefined || other === undefined || one === other
}

/** Are they one process of our engines, under two URLs? It draws its epoch at random; other servers' may be small numbers. */
export function sameEngine (one: End, other: End): boolean {
  return one.info?.epoch !== undefined && one.info.epoch === other.info?.epoch && one.info.backend.startsWith('fastify-epd/')
}

/** Why two nodes can't be linked, as far as it shows without a call. */
function refusal (from: NodeRecord, to: NodeRecord): string | undefined {
  for (const { id } of [from, to]) {
    if (isUnspecified(id)) return `${id} is no address another engine can dial: start it with a routable host name`
  }
  return sameFingerprint(from, to) ? undefined : 'their models or processors differ (fingerprint)'
}

/**
 * Links of every pair that has something to exchange: made when both ends are well, made again when an end restarts or
 * the link is lost. One handshake per pair at a time. A refused pair rests until an end restarts or a warm-up is requested.
 */
export class Links {
  readonly #options: LinksOptions
  readonly #pairs = new Map<string, Pair>()
  /** Drops under way, by pair: a late one would undo the link of a node that was removed and added again. */
  readonly #undoing = new Map<string, Promise<void>>()
  readonly #closing = new AbortController()

  constructor (options: LinksOptions) {
    this.#options = options
    setMaxListeners(0, this.#closing.signal)
  }

  /** Brings the pairs of a node in line with what it is now. */
  sync (node: NodeRecord, nodes: Iterable<NodeRecord>): void {
    for (const other of nodes) {
      if (canExchange(node, other)) this.#keep(node, other)
      if (canExchange(other, node)) this.#keep(other, node)
    }
  }

  /** The node is gone. */
  remove (node: NodeRecord): void {
    for (const [key, pair] of this.#pairs) {
      if (pair.from !== node && pair.to !== node) continue
      this.#pairs.delete(key)
      clearTimeout(pair.timer)
      if (pair.state === 'linked') this.#undo(pair)
    }
  }

  views (): LinkView[] {
    return [...this.#pairs.values()].map(pair => pair.view)
  }

  ensure (from: NodeRecord, to: NodeRecord, signal: AbortSignal | undefined): Promise<Link> {
    const pair = this.#pairs.get(keyOf(from, to))
    if (pair === undefined) {
      return Promise.reject(new AdapterError('REFUSED', `${from.id} and ${to.id} have no transfer format in common`, { node: to.id }))
    }
    if (pair.state === 'linked') return Promise.resolve(pair.link!)
    if (pair.state === 'refused') return Promise.reject(new AdapterError('REFUSED', pair.reason!, { node: to.id }))
    return abortable(this.#start(pair), signal)
  }

  /** A new handshake follows: one end may still think the link good. */
  lost (from: NodeRecord, to: NodeRecord): void {
    const pair = this.#pairs.get(keyOf(from, to))
    if (pair?.state !== 'linked') return
    this.#set(pair, 'failed', 'the link was lost')
    this.#startQuietly(pair)
  }

  /** No node can use what this one produces. */
  refuse (from: NodeRecord, reason: string): void {
    for (const pair of this.#pairs.values()) {
      if (pair.from !== from || pair.state === 'refused') continue
      clearTimeout(pair.timer)
      this.#set(pair, 'refused', reason)
    }
  }

  async warmUp (): Promise<readonly LinkView[]> {
    const pairs = [...this.#pairs.values()]
    await Promise.allSettled(pairs.filter(pair => pair.state !== 'linked').map(pair => this.#start(pair)))
    return pairs.map(pair => pair.view)
  }

  async close (): Promise<void> {
    this.#closing.abort(new Error('the registry is closed'))
    const pairs = [...this.#pairs.values()]
    for (const pair of pairs) clearTimeout(pair.timer)
    await Promise.allSettled(pairs.map(pair => pair.attempt))
  }

  #keep (from: NodeRecord, to: NodeRecord): void {
    const key = keyOf(from, to)
    let pair = this.#pairs.get(key)
    if (pair === undefined) this.#pairs.set(key, pair = new Pair(from, to, this.#options.backoff))
    if (pair.state !== 'none' && pair.restarted && pair.attempt === undefined) this.#set(pair, 'none', undefined)
    if (pair.state === 'none' && from.state === 'healthy' && to.state === 'healthy') this.#startQuietly(pair)
  }

  #set (pair: Pair, state: LinkState, reason: string | undefined, link?: Link): void {
    Object.assign(pair, { state, reason, link, epochs: pair.currentEpochs(), lives: [pair.from.lives, pair.to.lives] })
    this.#options.onChange()
  }

  #start (pair: Pair): Promise<Link> {
    clearTimeout(pair.timer)
    pair.attempt ??= this.#handshake(pair).finally(() => { pair.attempt = undefined })
    return pair.attempt
  }

  /** The outcome shows in the pair's state. */
  #startQuietly (pair: Pair): void {
    this.#start(pair).catch(() => {})
  }

  async #handshake (pair: Pair): Promise<Link> {
    const { from, to } = pair
    this.#set(pair, 'linking', undefined)
    const { epochs, lives } = pair
    try {
      const reason = refusal(from, to)
      if (reason !== undefined) throw new AdapterError('REFUSED', reason, { node: to.id })
      await this.#undoing.get(keyOf(from, to))
      const link = await this.#call(call => from.adapter.link(from.forAdapter(), to.forAdapter(), call))
      pair.delay = this.#options.backoff
      this.#set(pair, 'linked', undefined, link)
      // A restart during the handshake shows in the epochs, and the next sync starts again.
      Object.assign(pair, { epochs: link.epochs, lives })
      return link
    } catch (cause) {
      const error = AdapterError.is(cause) ? cause : new AdapterError('UNAVAILABLE', (cause as Error).message, { node: to.id, cause })
      const refused = error.code === 'REFUSED'
      this.#set(pair, refused ? 'refused' : 'failed', error.message)
      Object.assign(pair, { epochs, lives })
      if (!refused) this.#retryLater(pair)
      throw error
    }
  }

  #retryLater (pair: Pair): void {
    if (this.#closing.signal.aborted) return
    const delay = pair.delay * (0.8 + 0.4 * Math.random())
    pair.delay = Math.min(this.#options.backoffMax, pair.delay * 2)
    pair.timer = setTimeout(() => {
      const wanted = this.#pairs.get(keyOf(pair.from, pair.to)) === pair && pair.from.state === 'healthy' && pair.to.state === 'healthy'
      if (wanted) this.#startQuietly(pair)
      else this.#set(pair, 'none', undefined)
    }, delay).unref()
  }

  #undo ({ from, to }: Pair): void {
    const key = keyOf(from, to)
    const undone = this.#call(async call => { await from.adapter.unlink?.(from.forAdapter(), to.forAdapter(), call) }).catch(() => {}).finally(() => {
      if (this.#undoing.get(key) === undone) this.#undoing.delete(key)
    })
    this.#undoing.set(key, undone)
  }

  /** Runs a call that ends with the time-out and with this registry. */
  async #call<T> (run: (call: Call) => Promise<T>): Promise<T> {
    const { timeout } = this.#options
    const controller = new AbortController()
    const close = (): void => { controller.abort(this.#closing.signal.reason) }
    const timer = setTimeout(() => { controller.abort(new Error(`no handshake within ${timeout} ms`)) }, timeout).unref()
    if (this.#closing.signal.aborted) close()
    else this.#closing.signal.addEventListener('abort', close)
    try {
      return await abortable(run(this.#options.call(controller.signal)), controller.signal)
    } finally {
      clearTimeout(timer)
      this.#closing.signal.removeEventListener('abort', close)
    }
  }
}

function keyOf (from: NodeRecord, to: NodeRecord): string {
  return `${from.id}\n${to.id}`
}
