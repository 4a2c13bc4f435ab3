import { isIP } from 'node:net'
import type { FastifyRequest, onRequestHookHandler } from 'fastify'
import { EngineError } from '../service/errors.ts'

/**
 * onRequest hook of the operators' routes of an engine without a key: lets this machine in, and no browser that names it by
 * another site's name, because a site can resolve its name to 127.0.0.1 (DNS rebinding). With a key the key decides.
 */
export function requireOperator (apiKey: string | undefined): onRequestHookHandler {
  return async function checkOperator (request) {
    if (apiKey !== undefined || (isLocal(request) && !(fromBrowser(request) && namedByOtherSite(request)))) return
    throw new EngineError('forbidden', 'Without an API key this route answers its own machine only: start the engine with --api-key and send it as Authorization: Bearer <key>.')
  }
}

function isLocal ({ ip, headers }: FastifyRequest): boolean {
  if (headers['x-forwarded-for'] !== undefined || headers.forwarded !== undefined || headers['x-real-ip'] !== undefined) return false
  const address = ip.replace(/^::ffff:(?=\d+\.)/i, '')
  return address === '::1' || (isIP(address) === 4 && address.startsWith('127.'))
}

/** Recognises browsers by headers that a page's script can't remove: `Origin` of a POST, `User-Agent` of a GET. */
function fromBrowser ({ headers }: FastifyRequest): boolean {
  return headers.origin !== undefined || headers['sec-fetch-site'] !== undefined || headers['user-agent']?.startsWith('Mozilla/') === true
}

function namedByOtherSite ({ hostname }: FastifyRequest): boolean {
  const name = hostname.replace(/^\[|\]$/g, '')
  return isIP(name) === 0 && name !== 'localhost' && !name.endsWith('.localhost')
}
