/**
 * Asks Kubernetes' API server for a document, or for the lines of a watch. The package says where it is and who asks; what it
 * asks by itself waits without end for a server that does not answer.
 */
import { once } from 'node:events'
import http, { type IncomingMessage } from 'node:http'
import https, { type RequestOptions } from 'node:https'
import { StringDecoder } from 'node:string_decoder'
import { abortable, abortReason, abortSignalOf, TimeLimit } from '../../adapters/abort.ts'

/** Of a list, and of a line of a watch. */
const MAX_LENGTH = 64 * 1_048_576
/** A connection that broke unseen is found. Milliseconds. */
const KEEP_ALIVE_MS = 30_000

export type Query = Readonly<Record<string, string>>

/** Of the package's KubeConfig; declarations import no optional package. */
interface Config {
  getCurrentCluster (): { readonly server: string } | null
  applyToHTTPSOptions (options: RequestOptions): Promise<void>
}

/** The server's own reason. */
export class RefusedError extends Error {
  readonly status: number

  constructor (status: number, reason: string) {
    super(`${status} ${reason}`)
    this.status = status
  }
}

export class ApiServer {
  readonly #config: Config
  readonly #path: string
  readonly #ending: AbortSignal
  /** For an answer to begin, and for a list to be there. Milliseconds. */
  readonly #patience: number

  constructor (config: Config, path: string, ending: AbortSignal, patience: number) {
    this.#config = config
    this.#path = path
    this.#ending = ending
    this.#patience = patience
  }

  async get (query: Query): Promise<unknown> {
    const limit = new TimeLimit(this.#patience, this.#ending)
    try {
      return JSON.parse(await textOf(await this.#ask(query, limit)))
    } finally {
      limit.clear()
    }
  }

  /** The lines that each chunk ends. @param ms for all of them, once they begin */
  async * lines (query: Query, ms: number): AsyncGenerator<readonly string[]> {
    const limit = new TimeLimit(this.#patience, this.#ending)
    try {
      const answer = await this.#ask(query, limit)
      limit.restart(ms)
      const decoder = new StringDecoder('utf8')
      let rest = ''
      for await (const chunk of answer) {
        const lines = (rest + decoder.write(chunk)).split('\n')
        rest = lines.pop()!
        bounded(rest)
        if (lines.length > 0) yield lines
      }
    } finally {
      limit.clear()
    }
  }

  async #ask (query: Query, limit: TimeLimit): Promise<IncomingMessage> {
    const options: RequestOptions = { headers: { accept: 'application/json' } }
    await abortable(this.#config.applyToHTTPSOptions(options), limit)
    const cluster = this.#config.getCurrentCluster()
    if (cluster === null) throw new Error('the kubeconfig has no current cluster')
    const url = new URL(cluster.server.replace(/\/$/, '') + this.#path)
    for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value)
    const request = (url.protocol === 'http:' ? http : https).request(url, { ...options, signal: abortSignalOf(limit) })
    request.setSocketKeepAlive(true, KEEP_ALIVE_MS)
    request.end()
    try {
      const [answer] = await once(request, 'response') as [IncomingMessage]
      if (answer.statusCode !== 200) throw new RefusedError(answer.statusCode!, reasonOf(await textOf(answer)))
      return answer
    } catch (err) {
      throw limit.aborted ? abortReason(limit) : err
    } finally {
      // From here on its errors are the answer's too.
      request.on('error', () => {})
    }
  }
}

async function textOf (answer: IncomingMessage): Promise<string> {
  const decoder = new StringDecoder('utf8')
  let text = ''
  for await (const chunk of answer) bounded(text += decoder.write(chunk))
  return text
}

function bounded (text: string): void {
  if (text.length > MAX_LENGTH) throw new Error(`the API server sends more than ${MAX_LENGTH / 1_048_576} MiB at once`)
}

/** Of a Status, or of what stands between us and the server. */
function reasonOf (text: string): string {
  try {
    const { message } = JSON.parse(text) as { message?: unknown }
    if (typeof message === 'string') return message
  } catch {}
  return text.slice(0, 200)
}
