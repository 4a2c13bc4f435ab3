import type { AdapterNode, Call, NodeInfo, Role } from '../adapter.ts'
import { requestJson } from '../http/json.ts'
import { health, models, PROBE_CALL, startingInfo } from '../probes.ts'
import { OUR_ENGINE } from '../wire/distserve.ts'
import { objectOf, textOf, type Json } from '../wire/json.ts'

const FEATURES = 'features:vllm-ec/1'
const KV = 'kv:vllm/1'

/** Which connectors a server runs with shows nowhere: one without them encodes and prefills by itself, and answers right. */
const TRANSFERS: Readonly<Record<Role, Pick<NodeInfo, 'produces' | 'accepts' | 'standalone'>>> = {
  encoder: { produces: [FEATURES], accepts: [] },
  hybrid: { produces: [], accepts: [FEATURES] },
  prefill: { produces: [KV], accepts: [FEATURES] },
  decode: { produces: [], accepts: [KV], standalone: true }
}

/** What a vLLM server says of itself; left in `NodeInfo.details`. */
export interface VllmDetails {
  readonly server: 'vllm'
  /** The cards of GET /v1/models, LoRA adapters too, but for what differs in each answer. */
  readonly models: readonly Json[]
  /** Of the first model, in tokens. */
  readonly maxModelLen: number | undefined
}

/**
 * GET /health, /v1/models and /version. Nodes of different versions exchange nothing, because their formats differ silently. No route says a server's role, nor which connectors it runs with: the role is
 * the registered one.
 */
export async function probeVllm (node: AdapterNode, call: Call): Promise<NodeInfo> {
  const status = await health(node, call)
  if (status === 'initialising') return startingInfo(node)
  const [list, version] = await Promise.all([models(node, call), versionOf(node, call)])
  const cards = list.cards.map(steady)
  const maxModelLen = cards[0]?.max_model_len
  return {
    status,
    models: list.ids,
    cards: list.cards,
    role: node.role,
    backend: version === undefined ? 'vllm' : `vllm ${version}`,
    version,
    ...TRANSFERS[node.role],
    // A consumer of pushed features waits for them, and encodes nothing itself.
    vision: node.vision ?? (node.ecZmqAddrs === undefined ? 'full' : 'features'),
    maxPrefillTokens: node.maxPrefillTokens,
    fingerprint: version === undefined ? undefined : `vllm ${version}`,
    notes: list.owner === OUR_ENGINE || list.owner === 'lmdeploy' || list.owner === 'sglang' ? [`is a server of ${list.owner}: without adapter in its entry the right one is found`] : [],
    details: { server: 'vllm', models: cards, maxModelLen: typeof maxModelLen === 'number' ? maxModelLen : undefined } satisfies VllmDetails
  }
}

/** The time and the permission's id are new in each answer: with them each probe would count as a change. */
function steady ({ created: _created, permission: _permission, ...card }: Json): Json {
  return card
}

async function versionOf (node: AdapterNode, call: Call): Promise<string | undefined> {
  const { body } = await requestJson(node, { method: 'GET', path: '/version', ...PROBE_CALL }, call)
  return textOf(objectOf(body).version)
}
