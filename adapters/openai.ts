import { AdapterError, type Adapter, type AdapterNode, type Call, type NodeInfo } from './adapter.ts'
import { passThrough, refuse } from './pass-through.ts'
import { health, models } from './probes.ts'

const NO_DISAGGREGATION = 'the openai adapter does no disaggregation'

/** /health is optional: a server that answers it badly but lists its models is alive. */
async function probe (node: AdapterNode, call: Call): Promise<NodeInfo> {
  const [status, list] = await Promise.all([
    health(node, call).catch(error => {
      if (AdapterError.is(error)) return 'healthy' as const
      throw error
    }),
    models(node, call)
  ])
  return {
    status,
    models: list.ids,
    cards: list.cards,
    role: node.role,
    backend: list.owner === undefined ? 'openai' : `openai (${list.owner})`,
    produces: [],
    accepts: [],
    vision: node.vision ?? 'full',
    notes: node.role === 'hybrid' ? [] : [`role ${node.role}: not used by plans, as ${NO_DISAGGREGATION}`]
  }
}

/** Any OpenAI-compatible server. It is taken to look at pictures unless the node option `vision` says otherwise. */
export const openai: Adapter = {
  specificationVersion: 'v1',
  name: 'openai',
  probe,
  link: (_a, b) => refuse(b, NO_DISAGGREGATION),
  encode: job => refuse(job.node, NO_DISAGGREGATION),
  prefill: job => refuse(job.node, NO_DISAGGREGATION),
  generate: passThrough,
  release: async () => {},
  abort: async () => {}
}
