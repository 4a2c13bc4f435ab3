/** The control fields of disaggregation: what a gateway adds to a client's body, by the role of the engine it sends it to. */
import type { EngineRole } from '../../service/engine-service.ts'
import type { LoadedModel } from '../../models/family.ts'
import { parseMigrationRequest } from './migration-request.ts'
import { isEmpty, readBoolean, refuse, unsupported, type Json } from './fields.ts'
import type { MigrationRequest } from '../sequence/prompt.ts'

/** Roles of an engine that has a decoder. */
export type LlmRole = Exclude<EngineRole, 'encoder'>

/** The engine that reads the request. */
export interface RequestTarget {
  readonly role: LlmRole
  readonly model: LoadedModel
  /** Tokens of a KV block. */
  readonly blockTokens: number
  /** The request is only to be prepared: its media are not there yet. */
  readonly ahead?: boolean | undefined
}

export interface ControlFields {
  /** P: keep the KV blocks under a lease and answer a migration request. */
  readonly preserve: boolean
  /** D: the migration request that P answered. */
  readonly migration: MigrationRequest | undefined
}

/**
 * `logprobs`: the request asks for log probabilities.
 * @throws EngineError naming the field that is wrong, or that this role does not take.
 */
export function readControl (body: Json, { role, model, blockTokens }: RequestTarget, logprobs: boolean): ControlFields {
  const { encoder_result: encoderResult, migration_request: migrationRequest } = body
  if (!isEmpty(encoderResult) && !isEmpty(migrationRequest)) refuse('migration_request', '"encoder_result" and "migration_request" exclude each other')
  const preserve = readPreserve(body, role)
  if (role !== 'decode') {
    if (!isEmpty(migrationRequest)) unsupported('migration_request', `this engine has the role ${role}: it takes no migration request`)
    return { preserve, migration: undefined }
  }
  if (!isEmpty(encoderResult)) unsupported('encoder_result', 'this engine has the role decode: it takes no encoder results, a prefill engine does')
  if (migrationRequest === undefined || migrationRequest === null) return { preserve, migration: undefined }
  // Each choice would need a first token of its own.
  if ((body.n ?? 1) !== 1) refuse('n', '"n" must be 1 with a migration request')
  return { preserve, migration: parseMigrationRequest(migrationRequest, { model, blockTokens, logprobs }) }
}

/** LMDeploy's two switches. Only one of them would keep blocks without an answer that names them, or name blocks that are not kept. */
function readPreserve (body: Json, role: LlmRole): boolean {
  const withCache = readBoolean(body, 'with_cache', false)
  const preserve = readBoolean(body, 'preserve_cache', false)
  if (!withCache && !preserve) return false
  if (role !== 'prefill') unsupported(withCache ? 'with_cache' : 'preserve_cache', `"${withCache ? 'with_cache' : 'preserve_cache'}" needs an engine with the role prefill`)
  if (!withCache || !preserve) refuse(withCache ? 'preserve_cache' : 'with_cache', '"with_cache" and "preserve_cache" go together')
  if ((body.n ?? 1) !== 1) refuse('n', '"n" must be 1 with "preserve_cache"')
  if (body.stream === true) refuse('stream', '"stream" must be false with "preserve_cache": there is one token, and the answer is complete with it')
  return true
}
