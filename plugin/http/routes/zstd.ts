/**
 * Bodies with `content-encoding: zstd`: decoded by Node.js where it can, from 22.15 on, else by the package zstddec, which is
 * libzstd as WebAssembly, in a thread of its own. Decoders in JavaScript don't bound their work: 24 bytes can cost fzstd 20 s.
 */
import { once } from 'node:events'
import { Transform } from 'node:stream'
import { Worker } from 'node:worker_threads'
import zlib from 'node:zlib'
import type { FastifyInstance } from 'fastify'
import { epdError } from '../../errors.ts'
import type { ZstdAnswer, ZstdBody } from './zstd-thread.ts'

/** Windows of 8 MiB: RFC 9659 lets this content coding have no larger ones. */
const WINDOW_LOG_MAX = 23

/** What the types of Node.js 20 don't have yet. */
const native: { readonly createZstdDecompress?: (options: object) => Transform, readonly constants: Readonly<Record<string, number>> } = zlib

export function zstdDecoders (app: FastifyInstance, limit: number): () => Transform {
  const { createZstdDecompress, constants: { ZSTD_d_windowLogMax: windowLogMax } } = native
  if (createZstdDecompress !== undefined) return () => createZstdDecompress({ params: { [windowLogMax!]: WINDOW_LOG_MAX } })
  const thread = new ZstdThread(limit)
  app.addHook('onClose', async () => { await thread.close() })
  return () => thread.decoder()
}

class ZstdThread {
  readonly #limit: number
  #worker: Worker | undefined
  #last: Promise<unknown> = Promise.resolve()

  constructor (limit: number) {
    this.#limit = limit
  }

  /** Takes the whole body before it gives anything. */
  decoder (): Transform {
    const chunks: Buffer[] = []
    let left = this.#limit
    const decoder: Transform = new Transform({
      transform: (chunk: Buffer, _encoding, done) => {
        left -= chunk.length
        chunks.push(chunk)
        done(left < 0 ? this.#tooLarge() : null)
      },
      flush: done => { this.#decode(decoder, chunks).then(decoded => { done(null, decoded) }, done) }
    })
    return decoder
  }

  async close (): Promise<void> {
    await this.#worker?.terminate()
  }

  /** One after the other. */
  async #decode (decoder: Transform, chunks: readonly Buffer[]): Promise<Uint8Array> {
    const next = async (): Promise<Uint8Array> => {
      if (decoder.destroyed) throw new Error('its client has left')
      return await this.#run({ bytes: new Uint8Array(Buffer.concat(chunks)), limit: this.#limit })
    }
    const decoded = this.#last.then(next, next)
    this.#last = decoded
    return await decoded
  }

  async #run (body: ZstdBody): Promise<Uint8Array> {
    const worker = this.#worker ??= new Worker(new URL('./zstd-thread.js', import.meta.url), { execArgv: [], env: {} })
    worker.unref()
    worker.postMessage(body, [body.bytes.buffer])
    try {
      const [answer] = await once(worker, 'message') as [ZstdAnswer]
      if (answer instanceof Uint8Array) return answer
      throw answer === 'too large' ? this.#tooLarge() : new Error(answer)
    } catch (err) {
      // The library keeps the memory of what it has not decoded to the end.
      this.#worker = undefined
      await worker.terminate()
      throw err
    }
  }

  #tooLarge (): Error {
    return epdError('EPD_ERR_BODY_TOO_LARGE', [this.#limit])
  }
}
