/** What a probe asks of any server that speaks OpenAI's API, and of those that speak LMDeploy's: state, models, engine_info. */
import { AdapterError, type AdapterNode, type Call, type NodeInfo } from './adapter.ts'
import { requestJson, requestOk } from './http/json.ts'
import { OUR_ENGINE, type EngineInfo } from './wire/distserve.ts'
import { isObject, listOf, objectOf, textOf, type Json } from './wire/json.ts'

/** None of its own: the option `timeouts.probe` ends the whole probe. A server that reads large pictures may take seconds to answer /health. */
export const PROBE_CALL = { timeout: 0, idempotent: true } as const

const STATUSES: ReadonlyMap<string, NodeInfo['status']> = new Map([
  ['healthy', 'healthy'],
  ['sleeping', 'sleeping'],
  ['draining', 'draining'],
  ['initializing', 'initialising'],
  ['initialising', 'initialising']
])

/** GET /health. A server without it, or an older one that answers 200 with no body, is healthy. Throws UNAVAILABLE when it calls itself unhealthy. */
export async function health (node: AdapterNode, call: Call): Promise<NodeInfo['status']> {
  const { statusCode, body } = await requestJson(node, { method: 'GET', path: '/health', ...PROBE_CALL }, call)
  const { status: word, message } = objectOf(body)
  const status = typeof word === 'string' ? STATUSES.get(word) : undefined
  if (status !== undefined) return status
  if ((statusCode >= 200 && statusCode < 300) || statusCode === 404) return 'healthy'
  throw new AdapterError('UNAVAILABLE', `${node.id} answered /health with ${statusCode}${typeof message === 'string' ? `: ${message}` : ''}`, { node: node.id })
}

export interface ModelList {
  readonly ids: readonly string[]
  /** `owned_by` of the first: `lmdeploy`, `vllm`, `sglang`, ... */
  readonly owner: string | undefined
  /** As the server wrote them. */
  readonly cards: readonly Json[]
}

/** GET /v1/models. Throws UNAVAILABLE, also for a refused key: a probe has no other error. */
export async function models (node: AdapterNode, call: Call): Promise<ModelList> {
  const answer = await requestOk(node, { method: 'GET', path: '/v1/models', ...PROBE_CALL }, call).catch((error: unknown) => {
    if (!AdapterError.is(error) || error.code === 'UNAVAILABLE') throw error
    throw new AdapterError('UNAVAILABLE', error.message, { node: error.node, cause: error })
  })
  const list = listOf(objectOf(answer).data).map(objectOf)
  return {
    ids: [...new Set(list.map(model => model.id).filter(id => typeof id === 'string'))],
    owner: textOf(list[0]?.owned_by),
    cards: list
  }
}

/** NodeInfo of a server that is still starting: it may not know its models yet. */
export function startingInfo (node: AdapterNode): NodeInfo {
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

/** The members of engine_info that a server has answered, others included. LMDeploy's has none of ours. */
export type EngineInfoAnswered = Readonly<Partial<EngineInfo>> & Json

/** `info`: 200. `turbomind`: 500, because LMDeploy's TurboMind has no engine_info. `absent`: 404, too old or another server. */
export type EngineInfoAnswer =
  | { readonly kind: 'info', readonly info: EngineInfoAnswered }
  | { readonly kind: 'turbomind' | 'absent' }

/** GET /distserve/engine_info. LMDeploy answers a JSON string that holds JSON; both forms are taken. Throws UNAVAILABLE. */
export async function engineInfo (node: AdapterNode, call: Call): Promise<EngineInfoAnswer> {
  const answer = await requestJson(node, { method: 'GET', path: '/distserve/engine_info', ...PROBE_CALL }, call)
  if (answer.statusCode === 500) return { kind: 'turbomind' }
  if (answer.statusCode === 404 || answer.statusCode === 405) return { kind: 'absent' }
  const info = answer.statusCode === 200 ? decode(answer.body) : undefined
  if (info !== undefined) return { kind: 'info', info }
  const why = answer.statusCode === 200 ? ' and no JSON object' : answer.statusCode === 401 || answer.statusCode === 403 ? ': start it with --api-key, and set apiKey of the node to the same' : ''
  throw new AdapterError('UNAVAILABLE', `${node.id} answered /distserve/engine_info with ${answer.statusCode}${why}`, { node: node.id })
}

function decode (body: unknown): EngineInfoAnswered | undefined {
  let value = body
  if (typeof value === 'string') {
    try { value = JSON.parse(value) } catch { return undefined }
  }
  return isObject(value) ? value : undefined
}

/** Is this engine_info of one of our reference engines? */
export function isOurs (info: EngineInfoAnswered): boolean {
  return info.engine === OUR_ENGINE
}

/** Which server a probe found behind a node: our reference engine (`epd`) or LMDeploy's api_server. Left in `NodeInfo.details`. */
export interface ServerDetails {
  readonly server: 'epd' | 'lmdeploy'
  readonly engine?: EngineInfoAnswered | undefined
}

/** What the last probe found of one of our engines; undefined of another server, and before the first. */
export function engineInfoOf (node: AdapterNode): EngineInfoAnswered | undefined {
  const { server, engine } = (node.info?.details ?? {}) as Partial<ServerDetails>
  return server === 'epd' ? engine : undefined
}

/** Did the last probe find one of our engines? False before the first. */
export function servedByEpd (node: AdapterNode): boolean {
  return (node.info?.details as Partial<ServerDetails> | undefined)?.server === 'epd'
}
