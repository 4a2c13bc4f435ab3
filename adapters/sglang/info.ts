/** What a probe finds out about an SGLang server. */
import { AdapterError, type AdapterNode, type Call, type NodeInfo } from '../adapter.ts'
import { requestJson, requestOk } from '../http/json.ts'
import { health, models, PROBE_CALL } from '../probes.ts'
import { listOf, numberOf, objectOf, textOf, type Json } from '../wire/json.ts'

/** An encoder pushes embeddings to a language server that asks for them through the gateway. */
export const PUSHED = 'push:sglang'
/** Path below the gateway's prefix at which it stands in for encoders: `/sglang/v/0`, `/sglang/v/1`, ... */
export const VIRTUAL_PATH = '/sglang/v/'

/** KV blocks between prefill and decode servers, which meet by `bootstrap_room`. */
export const KV_FORMAT = 'kv:sglang'

/** What a language server was started with, as far as the adapter cares. Kept in `NodeInfo.details`. */
export interface SglangDetails {
  readonly version: string | undefined
  /** Its vision tower is on encoders: `--language-only`. */
  readonly languageOnly: boolean
  /** Its encoders are the gateway's virtual ones. */
  readonly virtual: boolean
  /** `zmq_to_scheduler`, `zmq_to_tokenizer`, `mooncake`. */
  readonly transfer: string
  /** `--disaggregation-mode` */
  readonly mode: 'prefill' | 'decode' | undefined
  /** Where decode servers ask this prefill server for KV blocks, and how these move; both ends must agree. */
  readonly bootstrapPort: number
  readonly kvTransfer: string | undefined
  /** Does the model look at pictures at all? */
  readonly sees: boolean
}

export function detailsOf (node: AdapterNode): SglangDetails | undefined {
  return node.info?.details as SglangDetails | undefined
}

/** An encoder has /health and nothing else that describes it: neither models nor a version. It answers with an encode of its own, in its turn. */
export async function encoderInfo (node: AdapterNode, call: Call): Promise<NodeInfo> {
  const { statusCode } = await requestJson(node, { method: 'GET', path: '/health', ...PROBE_CALL }, call)
  if (statusCode !== 200) throw new AdapterError('UNAVAILABLE', `${node.id} answered /health with ${statusCode}`, { node: node.id })
  return { status: 'healthy', models: [], role: 'encoder', backend: 'sglang encoder', produces: [PUSHED], accepts: [], vision: 'full' }
}

export async function serverInfo (node: AdapterNode, call: Call): Promise<NodeInfo> {
  const [status, list, details] = await Promise.all([health(node, call), models(node, call), detailsOf(node) ?? readDetails(node, call)])
  const { version, languageOnly, virtual, transfer, mode, sees } = details
  return {
    status,
    models: list.ids,
    cards: list.cards,
    role: mode ?? node.role,
    backend: mode === undefined ? 'sglang' : `sglang ${mode}`,
    version,
    produces: mode === 'prefill' ? [KV_FORMAT] : [],
    accepts: [...(languageOnly && virtual ? [PUSHED] : []), ...(mode === 'decode' ? [KV_FORMAT] : [])],
    vision: node.vision ?? (!sees ? 'none' : languageOnly && virtual ? 'features' : 'full'),
    checkMedia: languageOnly,
    notes: [
      ...(mode === undefined && node.role !== 'hybrid' ? [`role ${node.role}: not used by plans without --disaggregation-mode`] : []),
      ...(languageOnly && !virtual ? [`calls its encoders past the gateway: name the gateway's ${VIRTUAL_PATH}0, ${VIRTUAL_PATH}1, ... in --encoder-urls`] : []),
      ...(languageOnly && transfer === 'zmq_to_scheduler' ? ['zmq_to_scheduler: a picture that fails ends this server (0.5.23); zmq_to_tokenizer does not'] : [])
    ],
    details
  }
}

/** Asked once per process: /server_info bothers the scheduler. */
async function readDetails (node: AdapterNode, call: Call): Promise<SglangDetails> {
  const ask = async (path: string): Promise<Json> => objectOf(await requestOk(node, { method: 'GET', path, ...PROBE_CALL }, call))
  const [args, model] = await Promise.all([ask('/server_info'), ask('/model_info')])
  const transfer = textOf(args.encoder_transfer_backend)
  return {
    version: textOf(args.version),
    languageOnly: args.language_only === true,
    virtual: listOf(args.encoder_urls).some(url => typeof url === 'string' && url.includes(VIRTUAL_PATH)),
    transfer: transfer === undefined || transfer === 'auto' ? 'zmq_to_scheduler' : transfer,
    mode: args.disaggregation_mode === 'prefill' || args.disaggregation_mode === 'decode' ? args.disaggregation_mode : undefined,
    bootstrapPort: numberOf(args.disaggregation_bootstrap_port) ?? 8998,
    kvTransfer: textOf(args.disaggregation_transfer_backend),
    sees: model.has_image_understanding !== false
  }
}
