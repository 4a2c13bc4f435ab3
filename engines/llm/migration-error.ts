import { CacheError } from '../cache/errors.ts'
import { EngineError } from '../errors.ts'
import { P2PError } from '../p2p/errors.ts'

function ofP2P (err: P2PError): EngineError {
  const options = { cause: err }
  switch (err.code) {
    case 'STALE':
    case 'GONE':
    case 'TIMEOUT':
      return new EngineError('features_gone', `the encoder can't deliver the features: ${err.message}`, options)
    case 'NOT_LINKED':
      return new EngineError('not_linked', `no link to the encoder: ${err.message}`, options)
    case 'REFUSED':
      return new EngineError('wrong_model', `the encoder refused the transfer: ${err.message}`, options)
    case 'CORRUPT':
      return new EngineError('features_corrupt', `the features were damaged on their way: ${err.message}`, options)
    case 'CLOSED':
      return new EngineError('draining', 'the engine is closing', options)
    case 'ABORTED':
      return new EngineError('cancelled', 'the migration was cancelled', options)
    default: {
      const unknown: never = err.code
      throw new Error(`unknown P2P error ${String(unknown)}`, options)
    }
  }
}

/** What a failed migration means to the client. `features_gone` makes the gateway start the request again at its planner. */
export function migrationError (err: unknown): Error {
  if (err instanceof P2PError) return ofP2P(err)
  if (err instanceof CacheError) return new EngineError('busy', `no room for features: ${err.message}`, { cause: err })
  return err instanceof Error ? err : new Error(String(err))
}
