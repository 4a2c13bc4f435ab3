import type { Adapter, AdapterNode, Call, GenerateJob, Link, UpstreamResponse } from './adapter.ts'
import { isBlind, refuse } from './pass-through.ts'
import { encodeVllm } from './vllm/encode.ts'
import { generateVllm } from './vllm/generate.ts'
import { refuseForged } from './vllm/guard.ts'
import { Handoffs, type Choice } from './vllm/handoffs.ts'
import { probeVllm } from './vllm/info.ts'
import { Pins } from './vllm/pins.ts'
import { prefillVllm, takeOver } from './vllm/prefill.ts'
import { Receivers } from './vllm/push.ts'
import { releasePushes } from './vllm/received.ts'
import { Written } from './vllm/written.ts'

export interface VllmOptions {
  /** Key of the names under which servers keep pictures; the same at all replicas of a gateway. @default random */
  readonly secret?: string | undefined
  /** How features reach the language model. @default auto */
  readonly handoff?: Choice | undefined
  /** What to do with embeddings (`image_embeds` and such) that a client sends. @default refuse */
  readonly embeds?: 'refuse' | 'allow' | undefined
}

/** vLLM's OpenAI server: a hybrid, an encoder, or P and D. */
export function createVllm ({ secret, handoff = 'auto', embeds = 'refuse' }: VllmOptions = {}): Adapter {
  const pins = new Pins(secret)
  const written = new Written()
  const handoffs = new Handoffs(handoff)
  const receivers = new Receivers()
  const pushes = ({ ecZmqAddrs }: AdapterNode): boolean => ecZmqAddrs !== undefined

  async function generate (job: GenerateJob, call: Call): Promise<UpstreamResponse> {
    const { node, body, handoff } = job
    refuseForged(node, body, embeds)
    if (handoff !== undefined) return await takeOver(job, handoff, call, performance.now())
    // One without vision weights (--language-model-only) takes what encoders have seen.
    if (job.features.length < body.media.length && isBlind(job)) return await refuse(node, `${node.id} has no vision weights: media would be lost`)
    return await generateVllm(job, call, pins, handoffs)
  }

  return {
    specificationVersion: 'v1',
    name: 'vllm',
    probe: probeVllm,
    // Servers find each other by what travels in requests. What a pair uses may change with what its requests show.
    link: async (a, b): Promise<Link> => ({
      from: a.id,
      to: b.id,
      get transport () { return a.role === 'encoder' ? `${handoffs.between(a, b)}${pushes(b) ? ', pushed' : ''}` : 'kv_transfer_params' },
      get mixes () { return a.role === 'encoder' && !pushes(b) && handoffs.between(a, b) === 'raw' },
      epochs: [undefined, undefined]
    }),
    encode: async (job, call) => {
      if (job.node.role !== 'encoder') return await refuse(job.node, `${job.node.id} encodes for no other node: its role is ${job.node.role}`)
      refuseForged(job.node, job.body, embeds)
      // Rewritten or pushed, the features must be there: the encoder is asked each time, and says where.
      const receiver = receivers.of(job.consumer, job.body)
      const results = await encodeVllm(job, call, pins, receiver === undefined && handoffs.between(job.node, job.consumer) === 'raw' ? written : undefined, receiver)
      handoffs.encoded(job.node, results)
      return results
    },
    has: (node, item, body, tenant) => written.has(node, pins.pin(item, body, node.id, tenant).name),
    prefill: async (job, call) => {
      if (job.node.role !== 'prefill') return await refuse(job.node, `${job.node.id} hands no KV blocks on: its role is ${job.node.role}`)
      refuseForged(job.node, job.body, embeds)
      return await prefillVllm(job, call, pins, handoffs)
    },
    generate,
    // Nothing else is held: files stay, and P frees its blocks after 30 s.
    release: async (leases, call) => { await releasePushes(leases, call.log) },
    // A server stops a request when its connection closes.
    abort: async () => {}
  }
}
