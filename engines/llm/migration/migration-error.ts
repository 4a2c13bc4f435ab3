import type { PoolName } from '../../cache/index.ts'
import { CacheError } from '../../cache/room-queue.ts'
import { EngineError, type EngineErrorCode } from '../../service/errors.ts'
import { P2PError } from '../../p2p/types.ts'

interface Words {
  readonly producer: string
  readonly blocks: string
  readonly gone: EngineErrorCode
  readonly corrupt: EngineErrorCode
}

const WORDS: Readonly<Record<PoolName, Words>> = {
  feature: { producer: 'the encoder', blocks: 'features', gone: 'features_gone', corrupt: 'features_corrupt' },
  kv: { producer: 'the prefill engine', blocks: 'keys and values', gone: 'kv_gone', corrupt: 'kv_corrupt' }
}

function ofP2P (err: P2PError, { producer, blocks, gone, corrupt }: Words): EngineError {
  const options = { cause: err }
  switch (err.code) {
    case 'STALE':
    case 'GONE':
    case 'TIMEOUT':
      return new EngineError(gone, `${producer} can't deliver the ${blocks}: ${err.message}`, options)
    case 'INVALID':
      return new EngineError(gone, `${producer}'s ${blocks} can't be used: ${err.message}`, options)
    case 'NOT_LINKED':
      return new EngineError('not_linked', `no link to ${producer}: ${err.message}`, options)
    case 'REFUSED':
      return new EngineError('wrong_model', `${producer} refused the transfer: ${err.message}`, options)
    case 'CORRUPT':
      return new EngineError(corrupt, `the ${blocks} were damaged on their way: ${err.message}`, options)
    case 'CLOSED':
      return new EngineError('draining', 'the engine is closing', options)
    case 'ABORTED':
      return new EngineError('cancelled', 'the migration was cancelled', options)
    default:
      return err.code satisfies never
  }
}

/** What a failed migration means to the client. `features_gone` and `kv_gone` make the gateway start the request again at its planner. */
export function migrationError (err: unknown, pool: PoolName): Error {
  if (err instanceof P2PError) return ofP2P(err, WORDS[pool])
  if (err instanceof CacheError) return new EngineError('busy', `no room for ${WORDS[pool].blocks}: ${err.message}`, { cause: err })
  return err instanceof Error ? err : new Error(String(err))
}
