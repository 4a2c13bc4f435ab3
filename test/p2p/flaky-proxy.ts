import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net'
import type { P2PEndpointInfo } from '../../engines/p2p/index.ts'

export type Fault =
  | { kind: 'none' }
  /** Flips one bit of the byte so many bytes into what the producer sends. */
  | { kind: 'flip', at: number }
  /** Reads no more from either side after so many bytes from the producer, and keeps the connections open. */
  | { kind: 'stall', at: number }
  /** Resets both connections after so many bytes. */
  | { kind: 'cut', at: number }

/** A TCP proxy between two engines that damages what passes it. */
export class FlakyProxy {
  fault: Fault = { kind: 'none' }
  /** Bytes that came from the producer since `fault` was set last. */
  passed = 0
  readonly #server: Server
  readonly #sockets = new Set<Socket>()

  private constructor (port: number, host: string) {
    this.#server = createServer((client) => this.#join(client, connect(port, host)))
  }

  static async before (endpoint: P2PEndpointInfo): Promise<{ proxy: FlakyProxy, endpoint: P2PEndpointInfo }> {
    const { hostname, port } = new URL(endpoint.tcp)
    const proxy = new FlakyProxy(Number(port), hostname)
    await new Promise<void>((resolve) => proxy.#server.listen(0, '127.0.0.1', resolve))
    const own = (proxy.#server.address() as AddressInfo).port
    return { proxy, endpoint: { ...endpoint, tcp: `tcp://127.0.0.1:${own}`, ipc: null } }
  }

  arm (fault: Fault): void {
    this.passed = 0
    this.fault = fault
  }

  async close (): Promise<void> {
    for (const socket of this.#sockets) socket.destroy()
    await new Promise((resolve) => this.#server.close(resolve))
  }

  #join (client: Socket, producer: Socket): void {
    for (const [from, to] of [[client, producer], [producer, client]] as const) {
      this.#sockets.add(from)
      from.on('error', () => {})
      from.on('close', () => {
        this.#sockets.delete(from)
        to.destroy()
      })
      from.on('data', (data) => {
        const passing = from === producer ? this.#damage(data, client, producer) : data
        if (!to.destroyed && !to.write(passing)) {
          from.pause()
          to.once('drain', () => { if (this.fault.kind !== 'stall') from.resume() })
        }
      })
    }
  }

  /** @returns what is passed on of it */
  #damage (data: Buffer, client: Socket, producer: Socket): Buffer {
    const { fault, passed } = this
    this.passed += data.length
    if (fault.kind === 'none' || fault.at < passed || fault.at >= this.passed) return data
    if (fault.kind === 'flip') {
      data[fault.at - passed] = (data[fault.at - passed] as number) ^ 1
    } else if (fault.kind === 'stall') {
      client.pause()
      producer.pause()
      // The rest may be all that was still to come.
      return data.subarray(0, fault.at - passed)
    } else {
      client.resetAndDestroy()
      producer.resetAndDestroy()
    }
    return data
  }
}
