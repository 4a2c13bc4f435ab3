import { fork, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { forkOptions } from '../helper/node-command.ts'
import type { Command } from './child.ts'
import type { Offer, PeerOptions } from './peer.ts'

export interface Answer {
  endpoint?: P2PEndpointInfo
  name?: Offer['name']
  blocks?: number[]
  transport?: string
  equal?: boolean
  ended?: boolean
  idle?: boolean
  bytes?: number
  code?: string
  error?: string
}

/** A peer in a process of its own, so that a test can kill it with -9. */
export class EngineProcess {
  endpoint!: P2PEndpointInfo
  readonly #child: ChildProcess = fork(fileURLToPath(new URL('./child.js', import.meta.url)), forkOptions())

  static async start (id: string, options: PeerOptions = {}): Promise<EngineProcess> {
    const engine = new EngineProcess()
    const { endpoint, error } = await engine.ask({ op: 'open', id, options })
    if (endpoint === undefined) throw new Error(error)
    engine.endpoint = endpoint
    return engine
  }

  async ask (command: Command): Promise<Answer> {
    const answer = once(this.#child, 'message')
    this.#child.send(command)
    return (await answer)[0] as Answer
  }

  /** Starts something whose answer will never come. */
  tell (command: Command): void {
    this.#child.send(command)
  }

  async kill (): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return
    const exit = once(this.#child, 'exit')
    this.#child.kill('SIGKILL')
    await exit
  }
}
