import type { AdapterNode, Call, NodeInfo } from '../adapter.ts'
import type { EngineInfoAnswered } from '../probes.ts'
import { checkVision, type LmdeployDetails, type Vision } from './vision.ts'

/** How KV blocks travel between LMDeploy's PyTorch engines: RDMA or NVLink, set up by /distserve. */
const KV_FORMAT = 'kv:lmdeploy/1'
/** LMDeploy's default of --max-prefill-token-num. A longer prompt stalls for ever on role Prefill (InternLM/lmdeploy#4977). */
const LONGEST_PREFILL = 8192

const VISION_NOTES: Readonly<Record<Vision, readonly string[]>> = {
  full: [],
  none: ['a picture does not change its prompt: language-model-only or no vision model, so it gets no media'],
  unknown: ['could not find out whether it looks at pictures, so it gets no media for now; the node option `vision` settles it']
}

/** What a probe has learned of an LMDeploy api_server. `engine`: its engine_info, when it has one. */
export interface Probed {
  readonly backend: 'pytorch' | 'turbomind'
  readonly status: NodeInfo['status']
  readonly models: readonly string[]
  readonly engine?: EngineInfoAnswered | undefined
  readonly notes: readonly string[]
}

/** NodeInfo of an LMDeploy api_server. It exchanges no features; KV blocks only between its PyTorch engines. */
export async function infoOfLmdeploy (node: AdapterNode, { backend, status, models, engine, notes }: Probed, call: Call): Promise<NodeInfo> {
  const model = models[0]
  const encodes = node.role === 'hybrid' || node.role === 'prefill'
  const ask = node.vision === undefined && status === 'healthy' && model !== undefined && encodes
  const vision = ask ? await checkVision(node, model, call) : 'unknown'
  return {
    status,
    models,
    role: node.role,
    backend: `lmdeploy ${backend}`,
    ...transfersOf(node, backend === 'pytorch' && engine !== undefined),
    vision: node.vision ?? (vision === 'full' ? 'full' : 'none'),
    notes: [...notes, ...(ask ? VISION_NOTES[vision] : [])],
    details: { server: 'lmdeploy', engine, vision } satisfies LmdeployDetails
  }
}

function transfersOf (node: AdapterNode, movesBlocks: boolean): Pick<NodeInfo, 'produces' | 'accepts' | 'maxPrefillTokens' | 'standalone'> {
  if (movesBlocks && node.role === 'prefill') return { produces: [KV_FORMAT], accepts: [], maxPrefillTokens: node.maxPrefillTokens ?? LONGEST_PREFILL }
  return movesBlocks && node.role === 'decode' ? { produces: [], accepts: [KV_FORMAT], standalone: true } : { produces: [], accepts: [] }
}
