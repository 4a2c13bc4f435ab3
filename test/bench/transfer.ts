import { fork, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { curveKeyPair } from 'zeromq'
import type { CurveKeys, P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { median, table, type BenchContext } from './report.ts'

export const name = 'transfer'

const KIB = 1 << 10
const CHUNKS = [256, 512, 1024, 2048, 4096, 8192].map((kib) => kib * KIB)
const QUICK_CHUNKS = [1024, 4096].map((kib) => kib * KIB)
/** Below this share of raw zeromq at 1-8 MiB chunks a transfer is too slow. */
const BUDGET = 0.6

interface Way {
  title: string
  address: (dir: string) => string
  ipc: boolean
  curve: CurveKeys | undefined
}

const SIDES = ['ours', 'zmq', 'net'] as const
type Side = typeof SIDES[number]

/** `speed` in GB/s, `cpu` in seconds per GB over both processes. */
interface Figures { speed: number, cpu: number }

/** One end in a process of its own, not pinned to a core, like an engine. One call at a time. */
class End {
  readonly #child: ChildProcess = fork(fileURLToPath(new URL('./transfer-peer.js', import.meta.url)))

  async call<T> (method: string, ...args: unknown[]): Promise<T> {
    const answer = once(this.#child, 'message', { signal: AbortSignal.timeout(60_000) })
    this.#child.send({ id: 0, method, args })
    const [{ value, error }] = await answer as [{ value: T, error?: string }]
    if (error !== undefined) throw new Error(`${method}: ${error}`)
    return value
  }

  close (): void {
    this.#child.kill('SIGKILL')
  }
}

interface Ends { producer: End, consumer: End }

/** GB/s of block transfer with crc32 against raw zeromq and a raw socket, each figure the median of alternating rounds. */
export async function run (context: BenchContext): Promise<string> {
  const keys = curveKeyPair()
  const ways: Way[] = [
    { title: 'tcp', address: () => 'tcp://127.0.0.1:*', ipc: false, curve: undefined },
    { title: 'ipc', address: (dir) => `ipc://${join(dir, 'raw')}`, ipc: true, curve: undefined },
    { title: 'tcp + CURVE', address: () => 'tcp://127.0.0.1:*', ipc: false, curve: keys }
  ]
  const rows: Array<Array<string | number>> = []
  let worst = Infinity
  for (const way of ways) {
    for (const chunk of context.quick ? QUICK_CHUNKS : CHUNKS) {
      const { ours, zmq, net } = await measure(way, chunk, context)
      const share = ours.speed / zmq.speed
      context.log(`transfer ${way.title} ${chunk / KIB} KiB: ${ours.speed.toFixed(2)} GB/s, zeromq ${zmq.speed.toFixed(2)}, socket ${net.speed.toFixed(2)}; CPU s/GB ${ours.cpu.toFixed(2)}, ${zmq.cpu.toFixed(2)}, ${net.cpu.toFixed(2)}`)
      rows.push([way.title, chunk / KIB, ours.speed, zmq.speed, way === ways[0] ? net.speed : '-', share, ours.cpu, zmq.cpu])
      if (chunk >= 1024 * KIB && way.curve === undefined) worst = Math.min(worst, share)
    }
  }
  return [
    '## Block transfer',
    '',
    'One pull of blocks with crc32 on both sides, in GB/s, beside raw zeromq (Router to Dealer, one buffer sent repeatedly, received and dropped) and a raw TCP',
    `socket; producer and consumer in separate processes, median of ${context.rounds} rounds that alternate between the three. CPU is the sum of both processes.`,
    `Budget: at least ${BUDGET}x zeromq at 1-8 MiB over tcp and ipc; the lowest here is ${worst.toFixed(2)}x.`,
    '',
    table(['way', 'chunk KiB', 'blocks + crc32', 'raw zeromq', 'raw socket', 'share of zeromq', 'CPU s/GB', 'CPU s/GB, zeromq'], rows)
  ].join('\n')
}

async function measure (way: Way, chunk: number, context: BenchContext): Promise<Record<Side, Figures>> {
  const ends: Ends = { producer: new End(), consumer: new End() }
  const dir = mkdtempSync(join(tmpdir(), 'epd-bench-'))
  const bytes = (way.curve === undefined ? 128 : 32) << 20
  try {
    const sides = await openSides(ends, way, chunk, bytes, dir)
    const seen: Record<Side, { seconds: number[], cpu: number[] }> = { ours: { seconds: [], cpu: [] }, zmq: { seconds: [], cpu: [] }, net: { seconds: [], cpu: [] } }
    for (const side of SIDES) await sides[side]()
    for (let round = 0; round < context.rounds; round++) {
      for (const side of SIDES) {
        const before = await cpuOf(ends)
        seen[side].seconds.push(await sides[side]())
        seen[side].cpu.push(await cpuOf(ends) - before)
      }
    }
    await Promise.all([ends.producer.call('close'), ends.consumer.call('close')])
    const figures = (side: Side): Figures => ({ speed: bytes / median(seen[side].seconds) / 1e9, cpu: median(seen[side].cpu) / bytes * 1e9 })
    return { ours: figures('ours'), zmq: figures('zmq'), net: figures('net') }
  } finally {
    ends.producer.close()
    ends.consumer.close()
    rmSync(dir, { recursive: true, force: true })
  }
}

async function cpuOf ({ producer, consumer }: Ends): Promise<number> {
  return await producer.call<number>('cpu') + await consumer.call<number>('cpu')
}

async function openSides ({ producer, consumer }: Ends, way: Way, chunk: number, bytes: number, dir: string): Promise<Record<Side, () => Promise<number>>> {
  const { curve = null, ipc } = way
  const options = { ipc, bytes, chunkBytes: chunk, ...(curve === null ? {} : { curve }) }
  const endpoint = await producer.call<P2PEndpointInfo>('open', { ...options, id: 'producer' })
  await consumer.call('open', { ...options, id: 'consumer' })
  const { lease, blocks } = await producer.call<{ lease: string, blocks: number[] }>('offer')
  const address = await producer.call<string>('sourceZmq', way.address(dir), curve)
  const port = await producer.call<number>('sourceNet')
  return {
    ours: () => consumer.call<number>('drain', endpoint, lease, blocks),
    zmq: () => consumer.call<number>('drainZmq', address, chunk, bytes, curve),
    net: () => consumer.call<number>('drainNet', port, chunk, bytes)
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const quick = process.argv.includes('--quick')
  process.stdout.write(await run({ quick, rounds: quick ? 2 : 5, log: (line) => process.stderr.write(`${line}\n`) }) + '\n')
}
