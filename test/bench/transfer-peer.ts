import { connect, createServer, type AddressInfo } from 'node:net'
import { Dealer, Router } from 'zeromq'
import { BlockPool, LeaseTable } from '../../engines/cache/index.ts'
import { P2PNode, type CurveKeys, type P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { serve } from './processes.ts'

/*
 * One end of the transfer benchmark, in a process of its own. `source*` methods give an address, `drain*` methods take
 * `bytes` from it in messages of `chunk` and return the seconds it took. Raw sides send one buffer again and again, without
 * checksum, and their receivers only count: the floor that any protocol on top pays for.
 */
const BLOCK_BYTES = 32 << 10
const HIGH_WATER_MARK = 16

let node: P2PNode
let pool: BlockPool

async function open (options: { curve?: CurveKeys, ipc: boolean, bytes: number, chunkBytes?: number, window?: number, id: string }): Promise<P2PEndpointInfo> {
  pool = new BlockPool({ name: 'feature', numBlocks: options.bytes / BLOCK_BYTES, blockBytes: BLOCK_BYTES })
  // Touched once, so that no figure includes the first use of a page.
  new Uint8Array(pool.sab).fill(1)
  const { id: engineId, curve, ipc, chunkBytes, window } = options
  leases = new LeaseTable(1)
  node = await P2PNode.open({
    engineId,
    epoch: 1,
    fingerprint: 'bench',
    pools: { feature: { pool, shape: { block_tokens: 32, hidden_size: 256, dtype: 'float32' } } },
    leases,
    curve,
    ipc,
    chunkBytes,
    window
  })
  return node.endpoint
}

let leases: LeaseTable

function offer (): { lease: string, blocks: number[] } {
  const blocks = pool.allocate(pool.free) as number[]
  const { id: lease } = leases.open({ consumer: 'bench', pool: 'feature', blocks, ttlMs: 600_000, onEnd: () => pool.release(blocks) })
  return { lease, blocks }
}

async function drain (remote: P2PEndpointInfo, lease: string, remoteBlocks: number[]): Promise<number> {
  await node.connect(remote)
  const localBlocks = pool.allocate(remoteBlocks.length) as number[]
  const name = { engineId: remote.engine, epoch: remote.epoch, lease }
  const { ms } = await node.pull({ ...name, pool: 'feature', remoteBlocks, localBlocks })
  pool.release(localBlocks)
  return ms / 1000
}

const closers: Array<() => void> = []

async function sourceZmq (address: string, curve: CurveKeys | null): Promise<string> {
  const router = new Router({ linger: 0, mandatory: true, sendTimeout: 60_000, sendHighWaterMark: HIGH_WATER_MARK, ...(curve === null ? {} : { curveServer: true, curveSecretKey: curve.secretKey }) })
  await router.bind(address)
  closers.push(() => router.close())
  const run = async (): Promise<void> => {
    for await (const [peer, request] of router) {
      const { chunk, bytes } = JSON.parse(String(request)) as { chunk: number, bytes: number }
      const message = Buffer.alloc(chunk, 1)
      for (let sent = 0; sent < bytes; sent += chunk) await router.send([peer as Buffer, message])
    }
  }
  run().catch(() => {})
  return router.lastEndpoint as string
}

/** Kept here, because a socket that only its own pending promise refers to may be collected. */
const receivers = new Set<Dealer>()

async function drainZmq (address: string, chunk: number, bytes: number, curve: CurveKeys | null): Promise<number> {
  const keys = curve === null ? {} : { curvePublicKey: curve.publicKey, curveSecretKey: curve.secretKey, curveServerKey: curve.publicKey }
  const dealer = new Dealer({ linger: 0, receiveHighWaterMark: HIGH_WATER_MARK, ...keys })
  receivers.add(dealer)
  // Observed before it connects: otherwise the event may have passed.
  const warm = new Promise<void>((resolve) => dealer.events.on('handshake', () => resolve()))
  dealer.connect(address)
  const take = async (total: number): Promise<void> => {
    await dealer.send(JSON.stringify({ chunk, bytes: total }))
    let got = 0
    for await (const [message] of dealer) if ((got += message?.length ?? 0) >= total) return
  }
  await warm
  const startedAt = performance.now()
  await take(bytes)
  const seconds = (performance.now() - startedAt) / 1000
  dealer.close()
  receivers.delete(dealer)
  return seconds
}

async function sourceNet (): Promise<number> {
  const server = createServer((socket) => {
    socket.on('error', () => {})
    socket.once('data', (request) => {
      const { chunk, bytes } = JSON.parse(String(request)) as { chunk: number, bytes: number }
      const message = Buffer.alloc(chunk, 1)
      let sent = 0
      const more = (): void => {
        while (sent < bytes) {
          sent += chunk
          if (!socket.write(message)) return
        }
      }
      socket.on('drain', more)
      more()
    })
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  closers.push(() => server.close())
  return (server.address() as AddressInfo).port
}

async function drainNet (port: number, chunk: number, bytes: number): Promise<number> {
  const socket = connect(port, '127.0.0.1')
  await new Promise<void>((resolve) => socket.once('connect', resolve))
  const startedAt = performance.now()
  socket.write(JSON.stringify({ chunk, bytes }))
  let got = 0
  await new Promise<void>((resolve) => socket.on('data', (data) => { if ((got += data.length) >= bytes) resolve() }))
  const seconds = (performance.now() - startedAt) / 1000
  socket.destroy()
  return seconds
}

async function close (): Promise<void> {
  for (const end of closers) end()
  await node?.close()
}

/** Seconds of CPU this process has used, all threads. */
function cpu (): number {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1e6
}

serve({ cpu, open, offer, drain, sourceZmq, drainZmq, sourceNet, drainNet, close })
