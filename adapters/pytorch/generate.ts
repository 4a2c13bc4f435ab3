import { AdapterError, type AdapterErrorOptions, type Call, type EncoderResult, type GenerateJob, type UpstreamResponse } from '../adapter.ts'
import { postStream, type UpstreamFailure } from '../http.ts'
import { generatePlain, refuse, refusePrefill } from '../plain.ts'

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

function featuresGone ({ node, error }: UpstreamFailure): AdapterError | undefined {
  const gone = typeof error.code === 'string' ? GONE[error.code] : undefined
  if (gone === undefined) return undefined
  return new AdapterError('FEATURES_GONE', `${node.id} could not pull the features: ${error.message ?? error.code}`, { node: node.id, ...gone })
}

function missing (job: GenerateJob): number {
  const there = new Set(job.features.map(feature => feature.item))
  return job.body.media.filter(item => !there.has(item.index)).length
}

/**
 * The client's body with `encoder_result` added and each picture's URL replaced by the lease on its features; without
 * features as it came. Pixels go to nodes with vision weights only.
 */
export function generate (job: GenerateJob, call: Call): Promise<UpstreamResponse> {
  const { node, body } = job
  if (job.handoff !== undefined) return refusePrefill(node)
  if (job.features.length === 0) return generatePlain(job, call)
  if (node.info?.accepts.length === 0) return refuse(node, `${node.id} takes no encoder results`)
  if (node.info?.vision !== 'full' && missing(job) > 0) return refuse(node, `${node.id} has no vision weights, and ${missing(job)} media items are not encoded`)
  const features = [...job.features].sort((one, other) => one.item - other.item)
  const slices = body.splice({
    set: { encoder_result: JSON.stringify(features.map(feature => feature.wire)) },
    mediaUrls: leaseUrls(features, body.media.length)
  })
  return postStream(node, { path: job.path, body: slices }, call, featuresGone)
}

function leaseUrls (features: readonly EncoderResult[], length: number): Array<string | undefined> {
  const urls = new Array<string | undefined>(length).fill(undefined)
  for (const feature of features) urls[feature.item] = `epd:${feature.lease}`
  return urls
}
