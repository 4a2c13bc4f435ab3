/** One log line for each request of the OpenAI routes, when it is over. */
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { isEpdError } from '../errors.ts'
import { onClosed } from '../http/client.ts'
import { kHolder, kWatches, type Held, type Watch, type Watched } from '../http/handle.ts'
import { BESIDE_V1 } from '../http/routes/other.ts'
import type { Served } from '../pipeline/index.ts'

/** Call it before the plugin is registered, so that requests which its hooks refuse are logged too. */
export function logAccess (app: FastifyInstance, prefix: string): void {
  const below = [`${prefix}/v1/`, ...BESIDE_V1.map(path => prefix + path)]
  app.addHook('onRequest', (request, reply, done) => {
    if (below.some(path => request.url.startsWith(path))) follow(request, reply)
    done()
  })
}

function follow (request: FastifyRequest & Watched & Held, reply: FastifyReply): void {
  const arrived = performance.now()
  let closed = false
  // With the core, whose end comes after that of a client that leaves.
  let inside = false
  let facts: object = {}
  const write = (): void => {
    if (!closed || inside) return
    request.log.info({ key: request[kHolder]?.name, method: request.method, path: request.url.split('?', 1)[0], status: reply.raw.headersSent ? reply.statusCode : undefined, ...facts, duration_ms: Math.round(performance.now() - arrived) }, 'request')
  }
  const watch: Watch = {
    began ({ model }) {
      inside = true
      facts = named(model)
    },
    ended (served, { model }) {
      inside = false
      facts = { ...named(model), ...factsOf(served, arrived) }
      write()
    }
  }
  request[kWatches] = [...request[kWatches] ?? [], watch]
  let once = false
  onClosed(reply.raw, () => {
    if (once) return
    once = true
    closed = true
    write()
  })
}

/** What is passed on to any node names none. */
const named = (model: string): object => model === '' ? {} : { model }

/** What is undefined is left out of the line. */
function factsOf ({ delivery, error, plan, encodedBy = [], traceId }: Served, arrived: number): object {
  const usage = delivery?.closing().usage
  return {
    plan: plan?.topology,
    nodes: plan === undefined ? undefined : [...new Set([...encodedBy, ...(plan.prefill === undefined ? [] : [plan.prefill.id]), plan.node.id])],
    prompt_tokens: usage?.promptTokens,
    completion_tokens: usage?.completionTokens,
    ttft_ms: delivery?.firstByteAt === undefined ? undefined : Math.round(delivery.firstByteAt - arrived),
    outcome: outcomeOf(delivery?.outcome, error),
    trace_id: traceId
  }
}

function outcomeOf (outcome: NonNullable<Served['delivery']>['outcome'] | undefined, error: unknown): string {
  if (outcome !== undefined) return outcome === 'complete' ? 'ok' : outcome === 'client_gone' ? 'client_gone' : 'broken'
  if (isEpdError(error)) return error.statusCode === 499 ? 'client_gone' : error.clientCode
  return 'refused'
}
