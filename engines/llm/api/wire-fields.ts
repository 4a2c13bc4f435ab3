/** Reading what another engine answered and a gateway handed on: untrusted objects whose place in the body is part of each error. */
import { EngineError } from '../../service/errors.ts'
import type { RemoteBlocks } from '../sequence/remote.ts'

export type Dict = Readonly<Record<string, unknown>>

/** LMDeploy's protocol number for TCP, the only one our engines speak. */
export const PROTOCOL_TCP = 1
const MAX_TEXT = 2048

export function reject (message: string, param: string): never {
  throw new EngineError('invalid_request', message, { param })
}

export function dict (value: unknown, what: string, param: string): Dict {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) reject(`${what} must be an object`, param)
  return value as Dict
}

export function text (entry: Dict, key: string, param: string): string {
  const value = entry[key]
  if (typeof value !== 'string' || value === '' || value.length > MAX_TEXT) reject(`"${key}" must be a non-empty string of at most ${MAX_TEXT} characters`, `${param}.${key}`)
  return value
}

/** An integer from `min` to `max`. */
export function count (entry: Dict, key: string, param: string, { min = 0, max = Number.MAX_SAFE_INTEGER } = {}): number {
  const value = entry[key]
  if (!isCount(value, min, max)) reject(`"${key}" must be an integer from ${min} to ${max}`, `${param}.${key}`)
  return value
}

function isCount (value: unknown, min: number, max: number): value is number {
  return Number.isSafeInteger(value) && (value as number) >= min && (value as number) <= max
}

/** A list of at most `length` integers from 0 to `max`. */
export function integers (entry: Dict, key: string, param: string, { length = 65_536, max = Number.MAX_SAFE_INTEGER } = {}): number[] {
  const value = entry[key]
  const valid = Array.isArray(value) && value.length <= length && value.every(v => isCount(v, 0, max))
  if (!valid) reject(`"${key}" must be a list of at most ${length} integers from 0 to ${max}`, `${param}.${key}`)
  return value as number[]
}

/** A list of at most `length` members, each read by `read` with its own place. */
export function list<T> (entry: Dict, key: string, param: string, length: number, read: (value: unknown, param: string) => T): T[] {
  const value = entry[key]
  if (!Array.isArray(value) || value.length > length) reject(`"${key}" must be a list of at most ${length} members`, `${param}.${key}`)
  return (value as unknown[]).map((member, i) => read(member, `${param}.${key}[${i}]`))
}

/** The members by which blocks are named, all alike in encoder results and migration requests. */
export function remoteBlocks (entry: Dict, param: string): RemoteBlocks {
  if (entry.protocol !== undefined && entry.protocol !== PROTOCOL_TCP) reject(`"protocol" must be ${PROTOCOL_TCP} (TCP)`, `${param}.protocol`)
  return {
    engineId: text(entry, 'remote_engine_id', param),
    epoch: count(entry, 'epoch', param),
    lease: text(entry, 'lease', param),
    blocks: integers(entry, 'remote_block_ids', param)
  }
}
