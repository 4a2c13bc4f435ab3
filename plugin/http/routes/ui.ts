import type { FastifyInstance, FastifyPluginAsync } from 'fastify'
import { onRouteError } from '../error-answer.ts'
import { openAiError } from '../../../adapters/wire/openai-error.ts'
import type { Gateway } from '../../gateway.ts'
import { loadAssets } from '../../ui/assets.ts'
import { Broadcast } from '../../ui/broadcast.ts'
import { Feed } from '../../ui/feed.ts'
import { RANGES, type Range } from '../../ui/histograms.ts'
import { requireViewer } from './guard.ts'

export interface UiRoutesOptions {
  readonly gateway: Gateway
}

const MAX_PAGES = 8
const INTERVAL_MS = 1_000

const CHART_QUERY = { type: 'object', properties: { range: { enum: Object.keys(RANGES) } } } as const
const NODE_QUERY = { type: 'object', required: ['id'], properties: { id: { type: 'string', maxLength: 2_048 } } } as const

const NO_PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path d="M1 15 15 1" stroke="#8b9bad" stroke-width=".5"/></svg>'

/** The page runs its own scripts and styles, talks to its own origin, and is shown in no other page. */
const HEADERS: Readonly<Record<string, string>> = {
  'content-security-policy': "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin'
}

/** The inspection page: GET /epd/ and what it loads. Register it without fastify-plugin: its hooks are meant to stay inside. */
export const uiRoutes: FastifyPluginAsync<UiRoutesOptions> = async function uiRoutes (app, { gateway }) {
  app.setErrorHandler(onRouteError)
  app.addHook('onRequest', requireViewer(gateway))
  app.addHook('onRequest', async (_request, reply) => { reply.headers(HEADERS) })
  page(app)
  live(app, gateway)
  pictures(app, gateway)
}

function page (app: FastifyInstance): void {
  const assets = loadAssets()
  app.get('/epd', async (_request, reply) => reply.redirect(`${app.prefix}/epd/`, 308))
  for (const [name, { type, etag, bytes }] of assets) {
    app.get(name === 'index.html' ? '/epd/' : `/epd/${name}`, async (request, reply) => {
      reply.headers({ etag, 'cache-control': 'no-cache' })
      if (request.headers['if-none-match'] === etag) return reply.code(304).send()
      return reply.type(type).send(bytes)
    })
  }
}

function live (app: FastifyInstance, gateway: Gateway): void {
  const feed = new Feed(gateway)
  const broadcast = new Broadcast({
    maxClients: MAX_PAGES,
    interval: INTERVAL_MS,
    message: () => JSON.stringify(feed.state()),
    onStart: () => { feed.start() },
    onStop: () => { feed.stop() }
  })
  app.get<{ Querystring: { range?: Range } }>('/epd/charts', { schema: { querystring: CHART_QUERY } }, async ({ query: { range = '5m' } }, reply) => {
    reply.header('cache-control', 'no-store')
    return feed.charts(range)
  })
  app.get<{ Querystring: { id: string } }>('/epd/node', { schema: { querystring: NODE_QUERY } }, async ({ query: { id } }, reply) => {
    reply.header('cache-control', 'no-store')
    return feed.node(id) ?? reply.code(404).send({ error: openAiError(404, 'No node of this id is registered', 'unknown_node') })
  })
  // A HEAD request would open a stream that never ends and that its client can't read.
  app.get('/epd/feed', { exposeHeadRoute: false }, async (_request, reply) => {
    if (broadcast.full) return reply.code(503).header('retry-after', '5').send({ error: openAiError(503, `At most ${MAX_PAGES} pages can be open`, 'too_many_pages') })
    const headers = reply.getHeaders() as Record<string, string>
    reply.hijack()
    reply.raw.writeHead(200, { ...headers, 'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-store', 'x-accel-buffering': 'no' })
    broadcast.add(reply.raw)
  })
  app.addHook('preClose', async () => { broadcast.close() })
  app.addHook('onClose', async () => { feed.close() })
}

function pictures (app: FastifyInstance, { thumbnails }: Gateway): void {
  if (thumbnails === undefined) return
  app.get<{ Params: { trace: string, index: string } }>('/epd/pictures/:trace/:index', async (request, reply) => {
    const { trace, index } = request.params
    const found = await thumbnails.find(trace.toLowerCase(), Number(index))
    // Not kept: something to show all the same, as a browser makes noise about a picture that is missing.
    if (found === undefined) return reply.type('image/svg+xml').header('cache-control', 'no-store').send(NO_PICTURE)
    return reply.type(found.type).header('cache-control', 'private, max-age=600').send(found.bytes)
  })
}
