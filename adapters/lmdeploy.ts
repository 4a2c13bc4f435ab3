/** What LMDeploy's api_servers (both backends) and ours have in common: health, models, engine_info, the check of vision. */
import { AdapterError, ROLE_FROM_WIRE, type AdapterNode, type Call, type NodeInfo, type Role } from './adapter.ts'
import { requestJson, requestOk } from './http.ts'

const CONTROL_TIMEOUT = 3000
/** One token from one picture may take seconds on a cold server. */
const VISION_TIMEOUT = 8000

/** A grey 64 x 64 PNG: small, and large enough for every processor's least size. */
const PICTURE = 'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAKUlEQVR42u3MQREAAAwCIKMb3RD77SAA6VEEAoFAIBAIBAKBQCAQfA8G320AeXC6efoAAAAASUVORK5CYII='

const STATUSES: Readonly<Record<string, NodeInfo['status']>> = {
  healthy: 'healthy',
  sleeping: 'sleeping',
  draining: 'draining',
  initializing: 'initialising',
  initialising: 'initialising'
}

/** GET /health. A server without it, or an older one that answers 200 with no body, is healthy. Throws UNAVAILABLE when it calls itself unhealthy. */
export async function health (node: AdapterNode, call: Call): Promise<NodeInfo['status']> {
  const { statusCode, body } = await requestJson(node, { method: 'GET', path: '/health', timeout: CONTROL_TIMEOUT, idempotent: true }, call)
  const word = (body as { status?: unknown } | undefined)?.status
  const status = typeof word === 'string' ? STATUSES[word] : undefined
  if (status !== undefined) return status
  if ((statusCode >= 200 && statusCode < 300) || statusCode === 404) return 'healthy'
  const message = (body as { message?: unknown } | undefined)?.message
  throw new AdapterError('UNAVAILABLE', `${node.id} answered /health with ${statusCode}${typeof message === 'string' ? `: ${message}` : ''}`, { node: node.id })
}

export interface ModelList {
  readonly ids: readonly string[]
  /** `owned_by` of the first: `lmdeploy`, `vllm`, `sglang`, ... */
  readonly owner: string | undefined
}

/** GET /v1/models. Throws UNAVAILABLE, as a probe must, also for a refused key. */
export async function models (node: AdapterNode, call: Call): Promise<ModelList> {
  const answer = await requestOk(node, { method: 'GET', path: '/v1/models', timeout: CONTROL_TIMEOUT, idempotent: true }, call).catch(asUnavailable)
  const data = (answer as { data?: unknown }).data
  const list = Array.isArray(data) ? data as Array<{ id?: unknown, owned_by?: unknown } | null> : []
  const owner = list[0]?.owned_by
  return {
    ids: [...new Set(list.map(model => model?.id).filter(id => typeof id === 'string'))],
    owner: typeof owner === 'string' ? owner : undefined
  }
}

/** A server that is starting may not know its models yet, and need not. */
export function infoOfStarting (node: AdapterNode): NodeInfo {
  return {
    status: 'initialising',
    models: node.info?.models ?? [],
    role: node.role,
    backend: node.info?.backend ?? 'starting',
    produces: [],
    accepts: [],
    vision: 'none',
    notes: []
  }
}

/** A probe knows one error only. */
export function asUnavailable (error: unknown): never {
  if (!AdapterError.is(error) || error.code === 'UNAVAILABLE') throw error
  throw new AdapterError('UNAVAILABLE', error.message, { node: error.node, cause: error })
}

/** engine_info of LMDeploy's PyTorch engine, with what our engines add. */
export interface EngineInfoWire extends Readonly<Record<string, unknown>> {
  readonly tp_size?: number
  readonly block_size?: number
  readonly num_gpu_blocks?: number
  readonly engine?: string
  readonly version?: string
  readonly backend?: string
  readonly role?: number
  readonly epoch?: number
  readonly model?: string
  readonly fingerprint?: string
  readonly vision?: string
  readonly produces?: readonly string[]
  readonly accepts?: readonly string[]
}

/** `info`: 200. `turbomind`: 500, as its engine has no such thing. `absent`: 404, too old or another server. */
export type EngineInfoAnswer =
  | { readonly kind: 'info', readonly info: EngineInfoWire }
  | { readonly kind: 'turbomind' | 'absent' }

/** GET /distserve/engine_info. LMDeploy answers a JSON string that holds JSON; both forms are taken. Throws UNAVAILABLE. */
export async function engineInfo (node: AdapterNode, call: Call): Promise<EngineInfoAnswer> {
  const answer = await requestJson(node, { method: 'GET', path: '/distserve/engine_info', timeout: CONTROL_TIMEOUT, idempotent: true }, call)
  if (answer.statusCode === 500) return { kind: 'turbomind' }
  if (answer.statusCode === 404 || answer.statusCode === 405) return { kind: 'absent' }
  const info = answer.statusCode === 200 ? decode(answer.body) : undefined
  if (info !== undefined) return { kind: 'info', info }
  throw new AdapterError('UNAVAILABLE', `${node.id} answered /distserve/engine_info with ${answer.statusCode}${answer.statusCode === 200 ? ' and no JSON object' : ''}`, { node: node.id })
}

function decode (body: unknown): EngineInfoWire | undefined {
  let value = body
  if (typeof value === 'string') {
    try { value = JSON.parse(value) } catch { return undefined }
  }
  return typeof value === 'object' && value !== null ? value as EngineInfoWire : undefined
}

export function isOurs (info: EngineInfoWire): boolean {
  return info.engine === 'fastify-epd'
}

/** Is it one of our engines, by its last probe? */
export function isOurNode (node: AdapterNode): boolean {
  return (node.info?.details as { ours?: boolean } | undefined)?.ours === true
}

/** Our engines' own word on themselves. */
export function infoOfOurs (info: EngineInfoWire, status: NodeInfo['status'], ids: readonly string[], node: AdapterNode): NodeInfo {
  const role: Role = ROLE_FROM_WIRE[info.role ?? 0] ?? node.role
  const vision = info.vision === 'full' || info.vision === 'features' ? info.vision : 'none'
  return {
    status,
    models: ids.length > 0 || info.model === undefined ? ids : [info.model],
    role,
    backend: `fastify-epd/${info.version ?? '?'} ${info.backend ?? 'pytorch'}`,
    version: info.version,
    epoch: info.epoch,
    fingerprint: info.fingerprint,
    produces: info.produces ?? [],
    accepts: info.accepts ?? [],
    vision: node.vision ?? vision,
    maxPrefillTokens: node.maxPrefillTokens,
    standalone: role === 'decode' ? true : undefined,
    notes: roleNotes(role, node.role),
    details: { ours: true, engine: info }
  }
}

function roleNotes (role: Role, registered: Role): string[] {
  return role === registered ? [] : [`registered as ${registered}, says it is ${role}: taken as ${role}`]
}

export interface LmdeployDetails {
  readonly ours: false
  readonly engine?: EngineInfoWire | undefined
  readonly vision: 'full' | 'none' | 'unknown'
}

/**
 * Does this server look at pictures? LMDeploy with `--language-model-only` drops them without a word and answers 200,
 * and nothing it tells of itself shows that; so one picture is sent, and the prompt tokens counted with and without it.
 * Asked once per process: the answer lies in `info.details`. `unknown` is asked again by the next probe.
 */
export async function checkVision (node: AdapterNode, model: string, call: Call): Promise<LmdeployDetails['vision']> {
  const known = (node.info?.details as Partial<LmdeployDetails> | undefined)?.vision
  if (known === 'full' || known === 'none') return known
  try {
    const [without, withPicture] = await Promise.all([promptTokens(node, model, false, call), promptTokens(node, model, true, call)])
    if (without === undefined) return 'unknown'
    return withPicture !== undefined && withPicture > without ? 'full' : 'none'
  } catch (error) {
    if (call.signal.aborted) throw error
    call.log.warn({ err: error, node: node.id }, 'could not find out whether the node looks at pictures')
    return 'unknown'
  }
}

/** Undefined when the server rejects the request. */
async function promptTokens (node: AdapterNode, model: string, picture: boolean, call: Call): Promise<number | undefined> {
  const content = [{ type: 'text', text: 'Hi' }, ...(picture ? [{ type: 'image_url', image_url: { url: PICTURE } }] : [])]
  const json = { model, messages: [{ role: 'user', content }], max_tokens: 1, temperature: 0, stream: false }
  try {
    const answer = await requestOk(node, { method: 'POST', path: '/v1/chat/completions', json, timeout: VISION_TIMEOUT }, call)
    const tokens = (answer as { usage?: { prompt_tokens?: unknown } }).usage?.prompt_tokens
    return typeof tokens === 'number' ? tokens : undefined
  } catch (error) {
    if (AdapterError.is(error) && error.code === 'REJECTED') return undefined
    throw error
  }
}

/** How KV blocks travel between LMDeploy's PyTorch engines: RDMA or NVLink, set up by /distserve. */
export const LMDEPLOY_KV = 'kv:lmdeploy/1'
/** LMDeploy's default of --max-prefill-token-num. A longer prompt stalls for ever on role Prefill (InternLM/lmdeploy#4977). */
const LONGEST_PREFILL = 8192

type Division = Pick<NodeInfo, 'produces' | 'accepts' | 'maxPrefillTokens' | 'standalone'>

function divisionOf (node: AdapterNode, backend: 'pytorch' | 'turbomind', engine: EngineInfoWire | undefined): Division {
  const able = backend === 'pytorch' && engine !== undefined
  if (able && node.role === 'prefill') return { produces: [LMDEPLOY_KV], accepts: [], maxPrefillTokens: node.maxPrefillTokens ?? LONGEST_PREFILL }
  return able && node.role === 'decode' ? { produces: [], accepts: [LMDEPLOY_KV], standalone: true } : { produces: [], accepts: [] }
}

/** NodeInfo of a real LMDeploy api_server. It exchanges no features; KV blocks only between its PyTorch engines. */
export async function infoOfLmdeploy (
  node: AdapterNode, backend: 'pytorch' | 'turbomind', status: NodeInfo['status'], ids: readonly string[],
  engine: EngineInfoWire | undefined, notes: readonly string[], call: Call
): Promise<NodeInfo> {
  const model = ids[0]
  const encodes = node.role === 'hybrid' || node.role === 'prefill'
  const ask = node.vision === undefined && status === 'healthy' && model !== undefined && encodes
  const vision = ask ? await checkVision(node, model, call) : 'unknown'
  const all = [...notes, ...(ask ? VISION_NOTES[vision] : [])]
  return {
    status,
    models: ids,
    role: node.role,
    backend: `lmdeploy ${backend}`,
    ...divisionOf(node, backend, engine),
    vision: node.vision ?? (vision === 'full' ? 'full' : 'none'),
    notes: all,
    details: { ours: false, engine, vision } satisfies LmdeployDetails
  }
}

const VISION_NOTES: Readonly<Record<LmdeployDetails['vision'], readonly string[]>> = {
  full: [],
  none: ['a picture does not change its prompt: language-model-only or no vision model, so it gets no media'],
  unknown: ['could not find out whether it looks at pictures, so it gets no media for now; the node option `vision` settles it']
}
