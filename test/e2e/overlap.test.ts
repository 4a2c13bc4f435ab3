/** Pulling ahead through the gateway: the client leaves, or an engine goes, while the encoder works. */
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import type { LlmService } from '../../engines/llm/index.ts'
import epd from '../../plugin/index.ts'
import { startEngineFor, type ApiServer } from '../helper/engine.ts'
import { metric } from '../helper/metrics.ts'
import { drawScene } from '../helper/scenes.ts'
import { slowPicture } from '../helper/slow-picture.ts'
import { until } from '../helper/until.ts'

const media = { allowPrivate: true, allowedDomains: [] }

interface Stand { readonly url: string, readonly encoder: ApiServer, readonly engine: ApiServer }

async function stand (t: Test, overlap: boolean): Promise<Stand> {
  const [encoder, engine] = await Promise.all([startEngineFor(t, { role: 'encoder', media }), startEngineFor(t, { role: 'hybrid' })])
  const { url, app } = await gateway(t, [encoder, engine], overlap)
  await app.epd.nodes.waitFor(({ link }) => link(encoder.url, engine.url) === 'linked', { signal: AbortSignal.timeout(20_000) })
  return { url, encoder, engine }
}

async function gateway (t: Test, nodes: readonly ApiServer[], overlap: boolean): Promise<{ url: string, app: FastifyInstance }> {
  const app = Fastify({ forceCloseConnections: true })
  t.teardown(() => app.close())
  await app.register(epd, { nodes: nodes.map(({ url, engine: { role } }) => ({ url, role })), bypass: 'never', overlap, retries: 0 })
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  await app.epd.nodes.waitFor(({ nodes }) => nodes.every(node => node.state === 'healthy'), { signal: AbortSignal.timeout(20_000) })
  return { url, app }
}

async function ask (url: string, pictures: readonly string[], signal?: AbortSignal, before?: string): Promise<{ status: number, text: string, usage: unknown }> {
  const content = [...pictures.map(picture => ({ type: 'image_url', image_url: { url: picture } })), { type: 'text', text: 'How many shapes are there?' }]
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ model: 'tiny-internvl', temperature: 0, max_tokens: 12, messages: [...before === undefined ? [] : [{ role: 'user', content: before }, { role: 'assistant', content: 'Yes.' }], { role: 'user', content }] }), ...signal && { signal }
  })
  const body = await response.json() as { choices?: [{ message: { content: string } }], usage?: unknown }
  return { status: response.status, text: body.choices?.[0].message.content ?? JSON.stringify(body), usage: body.usage }
}

async function figures (url: string): Promise<(name: string, labels?: Record<string, string>) => number> {
  const text = await (await fetch(`${url}/metrics`)).text()
  return (name, labels) => metric(text, name, labels) ?? NaN
}

async function pulled (url: string): Promise<number> {
  return (await figures(url))('epd_ahead_items_total', { outcome: 'pulled' })
}

async function atRest ({ url }: ApiServer): Promise<void> {
  await until(async () => {
    const value = await figures(url)
    return value('epd_leases_open') === 0 && value('epd_feature_blocks_free') + value('epd_feature_blocks_cached') === value('epd_feature_blocks_capacity')
  }, `${url} is at rest`)
}

t.test('the switch: what is pulled ahead, and the same answer', async t => {
  const pictures = await Promise.all([1, 2].map(drawScene))
  const answers: string[] = []
  for (const overlap of [false, true]) {
    const { url, encoder, engine } = await stand(t, overlap)
    const slow = await slowPicture(t, pictures[1]!)
    const answer = ask(url, [pictures[0]!, slow.url])
    if (overlap) await until(async () => await pulled(engine.url) === 1, 'the first picture is there before the second')
    if (overlap) await until(() => (engine.engine as LlmService).runtime!.engine.steps.prefilledTokens > 50, 'and is computed')
    slow.send()
    const { status, text } = await answer
    t.equal(status, 200, text)
    answers.push(text)
    const value = await figures(engine.url)
    if (overlap) t.ok(value('epd_ahead_items_total', { outcome: 'used' }) >= 1)
    else t.equal(value('epd_ahead_items_total'), 0)
    for (const one of [encoder, engine]) await atRest(one)
  }
  t.equal(answers[0], answers[1])
})

t.test('in front of P and D, too: the same answer, and the same usage', async t => {
  const picture = await drawScene(21)
  const answers: unknown[] = []
  for (const overlap of [false, true]) {
    const [encoder, p, d] = await Promise.all([startEngineFor(t, { role: 'encoder', media }), startEngineFor(t, { role: 'prefill' }), startEngineFor(t, { role: 'decode' })])
    const { url, app } = await gateway(t, [encoder, p, d], overlap)
    await app.epd.nodes.waitFor(({ link }) => link(encoder.url, p.url) === 'linked' && link(p.url, d.url) === 'linked', { signal: AbortSignal.timeout(20_000) })
    const slow = await slowPicture(t, picture)
    const { engine } = (p.engine as LlmService).runtime!
    const answer = ask(url, [slow.url], undefined, 'A circle is round, and a square has four corners. '.repeat(20))
    if (overlap) await until(() => engine.steps.prefilledTokens > 100 && engine.live.size === 0, 'the text is computed')
    slow.send()
    answers.push(await answer)
    for (const one of [encoder, p]) await atRest(one)
  }
  t.match(answers[0], { status: 200, usage: { prompt_tokens_details: { cached_tokens: 0 } } })
  t.same(answers[1], answers[0])
})

t.test('a client that leaves, an encoder and a language model that end meanwhile leave nothing behind', async t => {
  for (const who of ['client', 'encoder', 'engine'] as const) {
    const { url, encoder, engine } = await stand(t, true)
    const slow = await slowPicture(t, await drawScene(11))
    const client = new AbortController()
    const answer = ask(url, [await drawScene(12), slow.url], client.signal).catch(() => undefined)
    await until(async () => await pulled(engine.url) === 1, 'the first picture is there')
    if (who === 'client') client.abort()
    else await (who === 'encoder' ? encoder : engine).close()
    slow.send()
    t.not((await answer)?.status, 200, who)
    for (const one of [encoder, engine]) if (one !== (who === 'encoder' ? encoder : who === 'engine' ? engine : undefined)) await atRest(one)
  }
})
