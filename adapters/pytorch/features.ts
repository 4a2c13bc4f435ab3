import { AdapterError, type AdapterErrorOptions, type AdapterNode, type BodyEdits, type EncoderResult, type RequestBody } from '../adapter.ts'
import type { UpstreamFailure } from '../http.ts'

/**
 * Codes of our engines that mean: encode again. Features are most often gone because their encoder has restarted, and
 * then the link is dead too; making it again costs little where it was not.
 */
const GONE: Readonly<Record<string, Pick<AdapterErrorOptions, 'unlinked'>>> = {
  features_gone: { unlinked: true },
  features_corrupt: {},
  not_linked: { unlinked: true },
  wrong_model: { unlinked: true }
}

export function featuresGone ({ node, error }: UpstreamFailure): AdapterError | undefined {
  const gone = typeof error.code === 'string' ? GONE[error.code] : undefined
  if (gone === undefined) return undefined
  return new AdapterError('FEATURES_GONE', `${node.id} could not pull the features: ${error.message ?? error.code}`, { node: node.id, ...gone })
}

/** Why a node can't take these features; undefined when it can. Pixels go to nodes with vision weights only. */
export function unfit (node: AdapterNode, body: RequestBody, features: readonly EncoderResult[]): string | undefined {
  if (features.length > 0 && node.info?.accepts.some(format => format.startsWith('features:')) === false) return `${node.id} takes no encoder results`
  const missing = body.media.length - new Set(features.map(feature => feature.item)).size
  if (missing === 0 || node.info?.vision === 'full') return undefined
  return `${node.id} has no vision weights, and ${missing} media items are not encoded`
}

/** Adds `encoder_result` and replaces each picture's URL by the lease on its features; nothing without features. */
export function withFeatures (body: RequestBody, features: readonly EncoderResult[]): BodyEdits {
  if (features.length === 0) return {}
  const inOrder = [...features].sort((one, other) => one.item - other.item)
  const mediaUrls = new Array<string | undefined>(body.media.length).fill(undefined)
  for (const { item, lease } of inOrder) mediaUrls[item] = `epd:${lease}`
  return { set: { encoder_result: JSON.stringify(inOrder.map(feature => feature.wire)) }, mediaUrls }
}
