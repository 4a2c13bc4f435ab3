import { misfit, TRACE, TRACES } from './answer-shapes.ts'
import { ask, jsonOf, refusal, type GatewayAddress } from './gateway-client.ts'

/**
 * Reads one of a gateway's `/epd/traces` routes.
 *
 * @returns undefined for 404
 * @throws UnreachableError when nothing answers; Error when the server refuses, keeps no traces or is not a gateway
 */
export async function read<T extends object> (source: GatewayAddress, path: string): Promise<T | undefined> {
  const answer = await ask(source, path)
  if (answer.status === 404) {
    const reason = whyOff(answer.text)
    if (reason !== undefined) throw new Error(reason)
    return undefined
  }
  if (answer.status !== 200) throw new Error(refusal(answer))
  const found = jsonOf(answer.text)
  if (typeof found !== 'object' || found === null || !('traces' in found || 'spans' in found)) throw noTraces(source)
  const wrong = misfit('traces' in found ? TRACES : TRACE, found)
  if (wrong !== undefined) throw new Error(`${source.url} has traces of another version (${path.split('?', 1)[0]}${wrong})`)
  return found as T
}

export function noTraces ({ url }: GatewayAddress): Error {
  return new Error(`${url} keeps no traces: it is not a fastify-epd gateway, or its traces are switched off`)
}

/** The gateway's own words when its tracing is off. */
function whyOff (text: string): string | undefined {
  const { error } = (jsonOf(text) ?? {}) as { error?: { code?: unknown, message?: unknown } | null }
  return error?.code === 'tracing_off' ? String(error.message) : undefined
}
