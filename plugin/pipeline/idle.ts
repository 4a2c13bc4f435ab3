import type { ByteSink, UpstreamResponse } from '../../adapters/adapter.ts'
import type { CallScope } from './call-scope.ts'

/**
 * Ends an answer that has gone silent: no chunk for `ms`. Costs a flag per chunk and no timer of its own; silence is
 * therefore noticed between one and two times `ms`. A client that reads slowly is not silence.
 */
export class IdleWatch implements UpstreamResponse, ByteSink {
  readonly statusCode: number
  readonly headers: UpstreamResponse['headers']
  readonly #upstream: UpstreamResponse
  readonly #scope: CallScope
  readonly #ms: number
  #sink: ByteSink | undefined
  #moved = true

  /** @param scope the call's; its timeout from now on is the silence */
  constructor (upstream: UpstreamResponse, scope: CallScope, ms: number) {
    this.statusCode = upstream.statusCode
    this.headers = upstream.headers
    this.#upstream = upstream
    this.#scope = scope
    this.#ms = ms
    scope.watch(this)
    this.#rearm()
  }

  pipe (sink: ByteSink): Promise<void> {
    this.#sink = sink
    return this.#upstream.pipe(this)
  }

  buffer (limit: number): Promise<Buffer> {
    return this.#upstream.buffer(limit)
  }

  destroy (reason?: Error): void {
    this.#upstream.destroy(reason)
  }

  write (chunk: Buffer): boolean {
    this.#moved = true
    const more = this.#sink!.write(chunk)
    if (!more) this.#scope.disarm()
    return more
  }

  onDrain (resume: () => void): void {
    this.#sink!.onDrain(() => {
      this.#moved = true
      this.#rearm()
      resume()
    })
  }

  /** The scope's time is up. True when the answer really is silent, and ended now. */
  expired (): boolean {
    if (this.#moved) {
      this.#moved = false
      this.#rearm()
      return false
    }
    this.#upstream.destroy(new Error(`the node sent nothing for ${this.#ms} ms`))
    return true
  }

  #rearm (): void {
    this.#scope.rearm(performance.now() + this.#ms)
  }
}
