import { createHash, timingSafeEqual } from 'node:crypto'
import type { onRequestHookHandler } from 'fastify'
import { EngineError } from '../service/errors.ts'

/** Open to anybody, as in LMDeploy: liveness probes carry no keys. */
const EXEMPT = ['/health', '/nodes']

/** Checks `Authorization: Bearer`. Digests are compared, so neither content nor length of the key shows in the time it takes. */
export function bearerAuth (apiKey: string): onRequestHookHandler {
  const expected = digest(apiKey)
  return async function checkBearer (request) {
    if (EXEMPT.some(prefix => request.url === prefix || request.url.startsWith(prefix + '/') || request.url.startsWith(prefix + '?'))) return
    const given = /^Bearer (.+)$/i.exec(request.headers.authorization ?? '')?.[1]
    if (given === undefined || !timingSafeEqual(digest(given), expected)) {
      throw new EngineError('invalid_api_key', 'Missing or wrong API key: send Authorization: Bearer <key>.')
    }
  }
}

function digest (text: string): Buffer {
  return createHash('sha256').update(text).digest()
}
