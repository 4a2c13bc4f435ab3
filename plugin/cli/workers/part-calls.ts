/**
 * SGLang's language servers call encoders at whichever worker takes the connection. All calls about one request must come to
 * the worker that has it: the primary finds out which, and workers pass the calls on over sockets of their own.
 */
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { FastifyInstance } from 'fastify'
import { parseJson } from '../../../adapters/http/failures.ts'
import { readEncode, requestIdOf } from '../../../adapters/sglang/encoder.ts'
import { VIRTUAL_PATH } from '../../../adapters/sglang/info.ts'
import { objectOf, textOf } from '../../../adapters/wire/json.ts'
import { REMEMBERED_MS } from '../../sglang/parts.ts'
import { pictureHashes } from '../../sglang/encode.ts'
import { fromWorker, passTo } from './operators.ts'

/** What is known of a request from a call of its language server. */
export interface PartCall {
  readonly id: string
  /** Hashes of its pictures' URLs, in calls that bring them. */
  readonly keys: readonly string[]
}

export interface PartCallsOptions {
  readonly prefix: string
  /** Where the other workers reach this one. */
  readonly socket: string
  /** The socket of the worker that has the request. */
  readonly ownerOf: (call: PartCall) => Promise<string>
}

/** In a worker: register it before the plugin. */
export function meetAtOwner (app: FastifyInstance, { prefix, socket, ownerOf }: PartCallsOptions): void {
  app.addHook('preHandler', async (request, reply) => {
    const { body, routeOptions: { url } } = request
    if (url?.startsWith(prefix + VIRTUAL_PATH) !== true || !Buffer.isBuffer(body)) return
    const parsed = parseJson(body)
    const encode = readEncode(parsed)
    const id = requestIdOf(textOf(objectOf(parsed).req_id) ?? '')
    const owner = await ownerOf({ id, keys: typeof encode === 'string' ? [] : pictureHashes(encode) })
    if (owner !== socket) passTo(owner, request.url, request, reply, body)
  })
  const server = createServer((request, response) => {
    fromWorker(request)
    app.routing(request, response)
  })
  app.addHook('onReady', async () => {
    // Node.js' cluster would have the primary listen.
    server.listen({ path: socket, exclusive: true })
    await once(server, 'listening')
  })
  app.addHook('onClose', async () => {
    server.close()
    server.closeAllConnections()
  })
}

/** In the primary: requests once found stay where they are. */
export class Owners {
  readonly #find: (call: PartCall) => Promise<string>
  /** By the id of the request, in order of age. */
  readonly #found = new Map<string, { readonly since: number, readonly socket: Promise<string> }>()

  constructor (find: (call: PartCall) => Promise<string>) {
    this.#find = find
  }

  of (call: PartCall): Promise<string> {
    const before = performance.now() - REMEMBERED_MS
    for (const [id, { since }] of this.#found) {
      if (since >= before) break
      this.#found.delete(id)
    }
    let found = this.#found.get(call.id)
    if (found === undefined) this.#found.set(call.id, found = { since: performance.now(), socket: this.#find(call) })
    return found.socket
  }
}
