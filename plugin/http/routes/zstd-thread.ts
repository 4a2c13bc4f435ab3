/** A thread that decodes zstd. */
import { parentPort } from 'node:worker_threads'

export interface ZstdBody {
  readonly bytes: Uint8Array<ArrayBuffer>
  /** Of what comes out. */
  readonly limit: number
}

/** What comes out, or why nothing does. */
export type ZstdAnswer = Uint8Array | string

/** An optional peer: a name that a bundler can't resolve stays out of the bundle. */
const ZSTDDEC: string = 'zstddec/stream'

type Library = typeof import('zstddec/stream')

function decode ({ bytes, limit }: ZstdBody): ZstdAnswer {
  const parts: Uint8Array[] = []
  let length = 0
  let idle = false
  try {
    for (const part of decoder.decodeStreaming([bytes])) {
      // The library does not say that it can't go on: it comes back with nothing, for ever.
      if (part.length === 0 && idle) return 'it is not zstd'
      idle = part.length === 0
      length += part.length
      if (length > limit) return 'too large'
      parts.push(part)
    }
  } catch (err) {
    return (err as Error).message
  }
  return Buffer.concat(parts)
}

const { ZSTDDecoder } = await (import(ZSTDDEC) as Promise<Library>)
const decoder = new ZSTDDecoder()
await decoder.init()
parentPort!.on('message', (body: ZstdBody) => { parentPort!.postMessage(decode(body)) })
