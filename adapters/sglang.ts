import type { Adapter } from './adapter.ts'
import { refuse } from './pass-through.ts'
import { generateSglang } from './sglang/generate.ts'
import { encoderInfo, serverInfo } from './sglang/info.ts'

const CALLS_ENCODERS = 'an SGLang language server calls its encoders itself'

/** SGLang: encoders (`--encoder-only`), and language servers with or without their own vision tower. */
export const sglang: Adapter = {
  specificationVersion: 'v1',
  name: 'sglang',
  probe: (node, call) => node.role === 'encoder' ? encoderInfo(node, call) : serverInfo(node, call),
  link: (_a, b) => refuse(b, CALLS_ENCODERS),
  encode: job => refuse(job.node, CALLS_ENCODERS),
  prefill: job => refuse(job.node, 'prefill and decode of SGLang stay on one node'),
  generate: generateSglang,
  release: async () => {},
  // It stops by itself when the connection closes. /abort_request would end a server that waits for embeddings.
  abort: async () => {}
}
