/**
 * LMDeploy's DistServe on one fake api_server: the handshake, a Prefill role that keeps KV blocks by sessions it names as
 * its generation does, a Decode role that pulls them, and what goes wrong in either. A pull is an HTTP call between fakes.
 */
import { randomUUID } from 'node:crypto'

/** Which session id an answer of P has; see docs/adapters.md. The last two are proposals that are not released. */
export type Generation = '0.11' | '0.12' | '0.13' | '0.15' | 'cache_session_id' | 'remote_session_id'

export interface DistServeOptions {
  /** Wire integer: 1 hybrid, 2 prefill, 3 decode. */
  readonly role: number
  readonly generation?: Generation | undefined
  readonly tpSize?: number | undefined
  readonly blockSize?: number | undefined
  /** Refuses control fields without the proxy's header, as InternLM/lmdeploy#4969 proposes. */
  readonly gated?: boolean | undefined
}

export interface DistServeBody {
  readonly session_id?: number
  readonly with_cache?: boolean
  readonly preserve_cache?: boolean
  readonly migration_request?: Migration
}

interface Migration {
  readonly protocol?: unknown
  readonly remote_engine_id?: string
  readonly remote_session_id?: unknown
  readonly remote_token_id?: unknown
  readonly remote_block_ids?: unknown
}

export type Answer = { readonly status: number, readonly body: unknown }

/** Tokens beyond which role Prefill stalls for ever. */
const MAX_PREFILL = 8192
/** A prompt with these words has its end as first token. */
export const ENDS_AT_ONCE = 'say nothing'

export class FakeDistServe {
  readonly options: DistServeOptions
  /** Sessions whose KV blocks are kept, with the blocks. */
  readonly kept = new Map<number, number[]>()
  /** Sessions that POST /distserve/free_cache named, known or not. */
  readonly freed: unknown[] = []
  /** Sessions that D has acknowledged, known or not. */
  readonly acked: unknown[] = []
  readonly handshakes: Array<{ readonly path: string, readonly body: any }> = []
  /** Answers status 2 to p2p_connect. */
  refusesToConnect = false
  readonly #connected = new Set<string>()
  #sessions = 0
  #blocks = 0

  constructor (options: DistServeOptions) {
    this.options = options
  }

  get #generation (): Generation { return this.options.generation ?? '0.15' }

  info (blocks: number): object {
    const { tpSize = 1, blockSize = 64 } = this.options
    return { tp_size: tpSize, ep_size: 1, dp_size: 1, pp_size: null, dp_rank: 0, block_size: blockSize, num_cpu_blocks: 0, num_gpu_blocks: blocks }
  }

  /** As a killed process. */
  forget (): void {
    this.kept.clear()
    this.#connected.clear()
  }

  control (path: string, body: any, port: number): Answer | undefined {
    if (path.startsWith('/distserve/p2p')) this.handshakes.push({ path, body })
    switch (path) {
      case '/distserve/p2p_initialize':
        // DSLime reads its link_type in any case.
        if (body.protocol === 2 && body.rdma_config === null) return { status: 500, body: 'Internal Server Error' }
        return { status: 200, body: { status: 1, engine_endpoint_info: { zmq_address: `tcp://127.0.0.1:${port}` }, kvtransfer_endpoint_info: [{ protocol: 2, endpoint_info: `{"gid":"${port}"}`, cache_pools: [] }] } }
      case '/distserve/p2p_connect':
        if (!this.refusesToConnect) this.#connected.add(body.remote_engine_id)
        return { status: 200, body: { status: this.refusesToConnect ? 2 : 1 } }
      case '/distserve/p2p_drop_connect':
        this.#connected.delete(body.remote_engine_id)
        return { status: 200, body: { success: true } }
      case '/distserve/free_cache':
        this.freed.push(body.remote_session_id)
        this.kept.delete(body.remote_session_id)
        return { status: 200, body: { status: 'SUCCESS' } }
      case '/fake/pull': return this.#pulled(body)
      default: return undefined
    }
  }

  /** D reads the blocks of any session; an ACK of an unknown session frees nothing. */
  #pulled ({ session, blocks }: { session: number, blocks: number[] }): Answer {
    const there = [...this.kept.values()].some(kept => kept.join() === blocks.join())
    if (!there) return { status: 404, body: {} }
    this.acked.push(session)
    this.kept.delete(session)
    return { status: 200, body: {} }
  }

  /** Control fields where they must not be; undefined when all is well. */
  gate (body: DistServeBody, proxied: boolean): string | undefined {
    const fields = (['migration_request', 'with_cache', 'preserve_cache'] as const).filter(name => body[name] !== undefined)
    if (this.options.gated !== true || fields.length === 0 || (this.options.role !== 1 && proxied)) return undefined
    return `${fields[0]} is for a DistServe proxy only`
  }

  /** Role Prefill: extras of the answer, 'stalls', or how it fails. */
  prefill (body: DistServeBody, path: string, prompt: string): { readonly extras: Record<string, unknown> } | 'stalls' | 'fails' | 'occupied' {
    if (prompt.length / 4 > MAX_PREFILL) return 'stalls'
    const own = this.#generation === '0.11' || this.#generation === '0.12'
    const set = body.session_id !== undefined && body.session_id !== -1
    const session = set && own ? body.session_id! : ++this.#sessions
    if (this.kept.has(session)) return 'occupied'
    if (body.with_cache !== true) return { extras: {} }
    // remote_token_ids[0] of an empty list.
    if (prompt.includes(ENDS_AT_ONCE)) return 'fails'
    const blocks = Array.from({ length: 1 + Math.floor(prompt.length / 256) }, () => this.#blocks++)
    if (body.preserve_cache === true) this.kept.set(session, blocks)
    return { extras: { ...this.#named(session, body, path), cache_block_ids: blocks, remote_token_ids: [785] } }
  }

  #named (session: number, body: DistServeBody, path: string): Record<string, unknown> {
    const chat = path.startsWith('/v1/chat')
    switch (this.#generation) {
      case '0.11': return { id: String(session) }
      case '0.12':
      case '0.13': return { id: chat ? String(session) : String(body.session_id ?? -1) }
      case '0.15': return { id: chat ? `chatcmpl-${randomUUID()}` : String(body.session_id ?? -1) }
      default: return { id: chat ? `chatcmpl-${randomUUID()}` : '-1', [this.#generation]: session }
    }
  }

  /** Role Decode: pulls from P; false when its engine would be dead now. */
  async migrate ({ protocol, remote_engine_id: peer, remote_session_id: session, remote_block_ids: blocks, remote_token_id: token }: Migration): Promise<boolean> {
    if (protocol !== 2 || peer === undefined || !this.#connected.has(peer) || !Number.isInteger(token) || !Array.isArray(blocks)) return false
    const answer = await fetch(`${peer}/fake/pull`, { method: 'POST', body: JSON.stringify({ session, blocks }) }).catch(() => undefined)
    await answer?.arrayBuffer()
    return answer?.status === 200
  }
}
