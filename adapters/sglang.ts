import { AdapterError, type Adapter } from './adapter.ts'
import { refuse } from './pass-through.ts'
import { encoderInfo, serverInfo } from './sglang/info.ts'
import { decodeSglang, linkPair, prefillSglang, releasePrefill } from './sglang/pair.ts'
import { sendSglang } from './sglang/send.ts'

/** SGLang: encoders (`--encoder-only`), and language servers with or without their own vision tower, whole or as prefill and decode. */
export const sglang: Adapter = {
  specificationVersion: 'v1',
  name: 'sglang',
  probe: (node, call) => node.role === 'encoder' ? encoderInfo(node, call) : serverInfo(node, call),
  link: linkPair,
  encode: job => refuse(job.node, 'an SGLang language server calls its encoders itself'),
  prefill: prefillSglang,
  generate: async (job, call) => {
    const { node, path, body, features, handoff } = job
    if (features.length > 0) throw new AdapterError('REFUSED', `${node.id} takes no encoder results`, { node: node.id })
    return handoff === undefined ? await sendSglang(node, path, body, call) : await decodeSglang(job, handoff, call)
  },
  release: async leases => { for (const { wire } of leases) releasePrefill(wire) },
  // It stops by itself when the connection closes. /abort_request would end a server that waits for embeddings.
  abort: async () => {}
}
