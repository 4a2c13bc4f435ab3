import type { Transform } from 'node:stream'
import { createGunzip } from 'node:zlib'
import type { FastifyInstance } from 'fastify'
import { onClosed } from '../client.ts'

/** By the names of RFC 9110, section 8.4.1.3: `x-gzip` is an old one. */
const DECODERS: ReadonlyMap<string, () => Transform> = new Map([['gzip', createGunzip], ['x-gzip', createGunzip]])

/** Decodes bodies with `content-encoding: gzip` as they come. The limit of a body counts for what comes out, so that a small one can't become a large one. */
export function acceptGzip (app: FastifyInstance): void {
  app.addHook('preParsing', (request, reply, payload, done) => {
    const decoder = DECODERS.get(request.headers['content-encoding']?.toLowerCase() ?? '')
    if (decoder === undefined) { done(null, payload); return }
    const decoded = decoder()
    // It may be refused half read, or its client may leave.
    onClosed(reply.raw, () => { decoded.destroy() })
    payload.once('error', (err: Error) => { decoded.destroy(err) })
    done(null, payload.pipe(decoded))
  })
}
