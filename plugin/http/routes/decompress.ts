import type { Transform } from 'node:stream'
import { createGunzip } from 'node:zlib'
import type { FastifyInstance } from 'fastify'
import type { ResolvedOptions } from '../../options/index.ts'
import { onClosed } from '../client.ts'

/** Decodes compressed bodies as they come. The limit of a body counts for what comes out, so that a small one can't become a large one. */
export async function acceptCompressed (app: FastifyInstance, { gzip, zstd, body }: ResolvedOptions['limits']): Promise<void> {
  // By the names of RFC 9110, section 8.4.1.3: `x-gzip` is an old one.
  const decoders = new Map<string, () => Transform>(gzip ? [['gzip', createGunzip], ['x-gzip', createGunzip]] : [])
  if (zstd) decoders.set('zstd', (await import('./zstd.ts')).zstdDecoders(app, body))
  app.addHook('preParsing', (request, reply, payload, done) => {
    const decoder = decoders.get(request.headers['content-encoding']?.toLowerCase() ?? '')
    if (decoder === undefined) { done(null, payload); return }
    const decoded = decoder()
    // It may be refused half read, or its client may leave.
    onClosed(reply.raw, () => { decoded.destroy() })
    payload.once('error', (err: Error) => { decoded.destroy(err) })
    done(null, payload.pipe(decoded))
  })
}
