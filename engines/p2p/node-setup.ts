import { lookup } from 'node:dns/promises'
import { hostname } from 'node:os'
import type { PoolName } from '../cache/index.ts'
import { hostId } from './endpoint.ts'
import type { IpcDir } from './ipc-dir.ts'
import type { WorkerData, WorkerPool } from './messages.ts'
import type { P2PEndpointInfo, P2PNodeOptions, PoolInfo } from './types.ts'
import { MAX_CHUNK_BYTES, MAX_WINDOW, MIN_CHUNK_BYTES } from './wire.ts'

/** Measured by the transfer benchmark: smaller chunks cost more messages, larger ones and wider windows leave the caches. */
export const DEFAULT_CHUNK_BYTES = 2 << 20
export const DEFAULT_WINDOW = 3
export const DEFAULT_STALL_TIMEOUT_MS = 10_000
export const DEFAULT_HEARTBEAT_MS = 1000

const WILDCARDS = new Set(['0.0.0.0', '::'])

/** The host of the engine's URL, which is the name others know it by, unless that is only what it listens on. */
function nameIn (engineId: string): string | undefined {
  if (!URL.canParse(engineId)) return undefined
  const name = new URL(engineId).hostname.replace(/^\[|\]$/g, '')
  return name === '' || WILDCARDS.has(name) ? undefined : name
}

export function allowedPeersOf ({ curve, allowedPeers }: P2PNodeOptions): string[] {
  if (curve === undefined) return []
  return [...(allowedPeers ?? [curve.publicKey])]
}

export async function workerDataOf (options: P2PNodeOptions, ipc: IpcDir | undefined, refusals: SharedArrayBuffer): Promise<WorkerData> {
  const { chunkBytes = DEFAULT_CHUNK_BYTES, window = DEFAULT_WINDOW, curve, host = '127.0.0.1', port = 0 } = options
  if (!(chunkBytes >= MIN_CHUNK_BYTES && chunkBytes <= MAX_CHUNK_BYTES)) throw new RangeError(`chunkBytes must be ${MIN_CHUNK_BYTES} to ${MAX_CHUNK_BYTES}`)
  if (!(window >= 1 && window <= MAX_WINDOW)) throw new RangeError(`window must be 1 to ${MAX_WINDOW}`)
  if (curve === undefined && options.allowedPeers !== undefined) throw new RangeError('allowedPeers needs curve keys')
  const pools: Partial<Record<PoolName, WorkerPool>> = {}
  for (const [name, { pool, shape }] of Object.entries(options.pools)) {
    pools[name as PoolName] = { sab: pool.sab, blockBytes: pool.blockBytes, numBlocks: pool.total, dtype: shape.dtype }
  }
  // zeromq binds to addresses, not to names.
  const { address, family } = await lookup(host)
  return {
    engineId: options.engineId,
    epoch: options.epoch,
    pools,
    tcp: `tcp://${family === 6 ? `[${address}]` : address}:${port === 0 ? '*' : port}`,
    ipc: ipc?.address ?? null,
    curve: curve ?? null,
    allowedPeers: allowedPeersOf(options),
    chunkBytes,
    window,
    stallTimeoutMs: options.stallTimeoutMs ?? DEFAULT_STALL_TIMEOUT_MS,
    heartbeatMs: options.heartbeatMs ?? DEFAULT_HEARTBEAT_MS,
    refusals
  }
}

export function endpointOf (options: P2PNodeOptions, ipc: IpcDir | undefined, tcp: string): P2PEndpointInfo {
  const { engineId, epoch, fingerprint, host = '127.0.0.1', advertiseHost } = options
  const port = tcp.slice(tcp.lastIndexOf(':') + 1)
  const reachable = advertiseHost ?? (WILDCARDS.has(host) ? nameIn(engineId) ?? hostname() : host)
  const pools: Partial<Record<PoolName, PoolInfo>> = {}
  for (const [name, { pool, shape }] of Object.entries(options.pools)) {
    pools[name as PoolName] = { ...shape, block_bytes: pool.blockBytes, num_blocks: pool.total }
  }
  return {
    v: 1,
    engine: engineId,
    epoch,
    host_id: hostId(),
    tcp: `tcp://${reachable.includes(':') ? `[${reachable}]` : reachable}:${port}`,
    ipc: ipc?.address ?? null,
    curve: options.curve?.publicKey ?? null,
    fingerprint,
    pools
  }
}
