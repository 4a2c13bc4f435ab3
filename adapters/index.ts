/** The shipped adapters, and all an adapter of your own needs. */
import type { Adapter, AdapterNode, Call } from './adapter.ts'
import { openai } from './openai.ts'
import { engineInfo, health, isOurs, models } from './probes.ts'
import { pytorch } from './pytorch.ts'
import { sglang } from './sglang.ts'
import { turbomind } from './turbomind.ts'
import { createVllm } from './vllm.ts'
import { OUR_ENGINE } from './wire/distserve.ts'

export { abortSignalOf } from './abort.ts'
export * from './adapter.ts'
export { errorObject, failureError, postStream, type FailureReader, type HttpRequest, type UpstreamErrorObject, type UpstreamFailure } from './http.ts'
export { requestJson, requestOk, type JsonAnswer, type JsonRequest } from './http/json.ts'
export { createVllm, openai, pytorch, sglang, turbomind }
export type { VllmOptions } from './vllm.ts'

/** With a secret of this process. */
export const vllm = createVllm()

/** Shipped adapters by name. */
export const adapters: ReadonlyMap<string, Adapter> = new Map([pytorch, turbomind, vllm, sglang, openai].map(adapter => [adapter.name, adapter]))

const FUNCTIONS = ['probe', 'link', 'encode', 'prefill', 'generate', 'release', 'abort'] as const

/** Throws TypeError, naming what is missing, when a value is not an adapter of this contract. */
export function checkAdapter (value: unknown): asserts value is Adapter {
  const adapter = value as Partial<Adapter> | null
  if (typeof adapter !== 'object' || adapter === null) throw new TypeError('an adapter must be an object')
  if (typeof adapter.name !== 'string' || adapter.name === '') throw new TypeError('an adapter must have a name')
  if (adapter.specificationVersion !== 'v1') throw new TypeError(`adapter ${adapter.name}: specificationVersion must be 'v1', not ${JSON.stringify(adapter.specificationVersion)}`)
  for (const name of FUNCTIONS) {
    if (typeof adapter[name] !== 'function') throw new TypeError(`adapter ${adapter.name}: ${name} must be a function`)
  }
}

/** An adapter by its name, or the adapter given, checked. `extra` comes before the shipped ones. Throws TypeError. */
export function resolveAdapter (nameOrAdapter: string | Adapter, extra: readonly Adapter[] = []): Adapter {
  if (typeof nameOrAdapter !== 'string') {
    checkAdapter(nameOrAdapter)
    return nameOrAdapter
  }
  const found = extra.find(adapter => adapter.name === nameOrAdapter) ?? adapters.get(nameOrAdapter)
  if (found !== undefined) return found
  const known = [...new Set([...extra.map(adapter => adapter.name), ...adapters.keys()])].join(', ')
  throw new TypeError(`unknown adapter ${JSON.stringify(nameOrAdapter)}; known are ${known}`)
}

/**
 * Name of the shipped adapter for a node that registered without naming one: engine_info shows whether it is one of
 * LMDeploy's two backends or ours, /v1/models whether it is vLLM or SGLang; a server that is none of these is taken as `openai`. Throws UNAVAILABLE.
 */
export async function detectAdapter (node: AdapterNode, call: Call): Promise<'pytorch' | 'turbomind' | 'vllm' | 'sglang' | 'openai'> {
  // A starting server may not answer the other routes yet: `pytorch` waits for it, and detection runs again.
  if (await health(node, call).catch(() => undefined) === 'initialising') return 'pytorch'
  const [answer, { owner }] = await Promise.all([engineInfo(node, call).catch((error: Error) => error), models(node, call)])
  if (answer instanceof Error) {
    // Other servers may answer unknown paths with a page, or refuse them.
    if (owner === undefined || owner === 'lmdeploy' || owner === OUR_ENGINE) throw answer
    return owner === 'vllm' || owner === 'sglang' ? owner : 'openai'
  }
  if (answer.kind === 'info') return isOurs(answer.info) && answer.info.backend === 'turbomind' ? 'turbomind' : 'pytorch'
  if (owner === 'vllm' || owner === 'sglang') return owner
  const lmdeploy = owner === undefined || owner === 'lmdeploy'
  if (answer.kind === 'turbomind') return lmdeploy ? 'turbomind' : 'openai'
  return owner === 'lmdeploy' ? 'pytorch' : 'openai'
}
