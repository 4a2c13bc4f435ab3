/** Error codes of our engines that mean: an earlier stage's result is lost, start again at the plan. */
import { AdapterError, type AdapterErrorOptions, type EncoderResult } from '../adapter.ts'
import type { UpstreamFailure } from '../http.ts'
import { migrationRefused } from '../lmdeploy/generate.ts'

type Gone = Readonly<Record<string, Pick<AdapterErrorOptions, 'unlinked'>>>

/** What is gone is most often gone with its producer's process, and the link with it. Linking again costs little where the link was alive. */
const LINK: Gone = { not_linked: { unlinked: true }, wrong_model: { unlinked: true } }
const FEATURES: Gone = { ...LINK, features_gone: { unlinked: true }, features_corrupt: {} }
const KV: Gone = { ...LINK, kv_gone: { unlinked: true }, kv_corrupt: {} }

/** @param features as they were sent, in the order of their items */
export function featuresGone ({ node, error }: UpstreamFailure, features: readonly EncoderResult[]): AdapterError | undefined {
  // The client has not written these: an encoder has answered something that the engine can't use.
  const wrong = /^encoder_result\[(\d+)\]/.exec(error.param ?? '')?.[1]
  if (wrong !== undefined) return new AdapterError('FEATURES_GONE', `${node.id} can not use an encoder result: ${error.message ?? error.param}`, { node: node.id, producer: features[Number(wrong)]?.node })
  const gone = typeof error.code === 'string' ? FEATURES[error.code] : undefined
  if (gone === undefined) return undefined
  return new AdapterError('FEATURES_GONE', `${node.id} could not pull the features: ${error.message ?? error.code}`, { node: node.id, ...gone })
}

export function kvGone (failure: UpstreamFailure): AdapterError | undefined {
  const { node, error } = failure
  const gone = typeof error.code === 'string' ? KV[error.code] : undefined
  if (gone === undefined) return migrationRefused(failure)
  return new AdapterError('KV_GONE', `${node.id} could not take the prompt over: ${error.message ?? error.code}`, { node: node.id, ...gone })
}
