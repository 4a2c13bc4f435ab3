import type { ServerResponse } from 'node:http'
import type { AbortSignalLike } from '../pipeline/index.ts'
import { isClosed, offClosed, onClosed } from './relay/index.ts'

/**
 * A signal that aborts when the client leaves before the answer is whole, by the same rule as `clientGone`, but without
 * an AbortController: making one, listening and no longer listening costs as much as all of routing a text request.
 * Takes one listener.
 */
export class ClientConnection implements AbortSignalLike {
  readonly #raw: ServerResponse
  #listener: (() => void) | undefined

  constructor (raw: ServerResponse) {
    this.#raw = raw
  }

  get aborted (): boolean {
    return isClosed(this.#raw) && !this.#raw.writableEnded
  }

  addEventListener (_type: 'abort', listener: () => void): void {
    this.#listener = listener
    onClosed(this.#raw, this.#onClose)
  }

  removeEventListener (): void {
    this.#listener = undefined
    offClosed(this.#raw, this.#onClose)
  }

  readonly #onClose = (): void => {
    // writableEnded, as HTTP/2 calls cancelled streams finished (sveltejs/kit#16793).
    if (!this.#raw.writableEnded) this.#listener?.()
  }
}
