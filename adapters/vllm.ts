import type { Adapter, GenerateJob, UpstreamResponse, Call } from './adapter.ts'
import { postStream } from './http.ts'
import { isBlind, refuse } from './pass-through.ts'
import { failuresOf } from './vllm/failures.ts'
import { refuseForged } from './vllm/guard.ts'
import { probeVllm } from './vllm/info.ts'

export interface VllmOptions {
  /** What to do with embeddings (`image_embeds` and such) that a client sends. @default refuse */
  readonly embeds?: 'refuse' | 'allow' | undefined
}

const NO_DISAGGREGATION = 'the vllm adapter does no disaggregation yet'

/** vLLM's OpenAI server. */
export function createVllm ({ embeds = 'refuse' }: VllmOptions = {}): Adapter {
  async function generate (job: GenerateJob, call: Call): Promise<UpstreamResponse> {
    const { node, path, body } = job
    refuseForged(node, body, embeds)
    if (isBlind(job)) return await refuse(node, `${node.id} has no vision weights: media would be lost`)
    return await postStream(node, { path, body: body.splice({}) }, call, failuresOf(body))
  }

  return {
    specificationVersion: 'v1',
    name: 'vllm',
    probe: probeVllm,
    link: (_a, b) => refuse(b, NO_DISAGGREGATION),
    encode: job => refuse(job.node, NO_DISAGGREGATION),
    prefill: job => refuse(job.node, NO_DISAGGREGATION),
    generate,
    release: async () => {},
    abort: async () => {}
  }
}
