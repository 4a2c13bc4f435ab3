/**
 * What must hold of a gateway before vLLM's servers, whether they are real (npm run test:vllm) or the fake that replays
 * them (test/adapters/vllm-house.test.ts).
 */
import type { Test } from 'tap'
import { createVllm, type Adapter, type Handoff } from '../../adapters/index.ts'
import type { EpdOptions } from '../../plugin/index.ts'
import { buildGateway } from '../helper/fake-gateway.ts'
import { seeded } from '../helper/random.ts'
import { until } from '../helper/until.ts'
import { ask, type Told } from './ask.ts'
import { chat, dataUrl, embedsPart, imagePart, picture, textPart, type Part } from './pictures.ts'

export interface Peer {
  readonly url: string
  readonly role: 'encoder' | 'hybrid' | 'prefill' | 'decode'
  /** Where encoders push features to. */
  readonly ecZmqAddrs?: readonly string[]
  alive (): Promise<boolean>
  /** As kill -9. Absent when this run did not start the server. */
  kill? (): Promise<void>
  /** Starts it again at the same address; resolves when it answers. */
  start? (): Promise<void>
}

export interface House {
  /** A server that does it all by itself: what it answers is right. */
  readonly plain: string
  readonly peers: readonly Peer[]
  /** The folder for embeddings that E and PD (or P) share. */
  readonly folder: {
    clear (): Promise<void>
    truncate (): Promise<void>
    /** What stands outside it but has its form. */
    outside (): Promise<readonly string[]>
  }
  /** Milliseconds that a start may take. */
  readonly patience: number
  /** File for what gateways log. */
  readonly log?: string
}

export type Gateway = Awaited<ReturnType<typeof gatewayBefore>>

export async function gatewayBefore (t: Test, { peers, patience, log }: House, options: EpdOptions = {}, adapter = 'vllm') {
  const nodes = peers.map(({ url, role, ecZmqAddrs }) => ({ url, role, adapter, ...(ecZmqAddrs === undefined ? {} : { ecZmqAddrs }) }))
  const { app, url } = await buildGateway(t, {
    options: { nodes, bypass: 'never', ...options },
    ...(log === undefined ? {} : { fastify: { logger: { level: 'warn', file: log } } })
  })
  const healthy = async (...of: readonly Peer[]): Promise<void> => {
    for (const peer of of) app.epd.nodes.probe(peer.url)
    await app.epd.nodes.waitFor(({ byId }) => of.every(peer => byId.get(peer.url)?.state === 'healthy'), { signal: AbortSignal.timeout(patience) })
  }
  await healthy(...peers)
  await app.epd.nodes.warmUp()
  return { app, url, healthy }
}

const SIZES = [[56, 56], [84, 84], [112, 56], [56, 140], [168, 168], [224, 224], [308, 196], [448, 448]] as const
const WORDS = ['what is it', 'which colours', 'describe the picture', 'how many', 'tell me more']

/** Requests of 1 to 4 pictures in which each of `count` pictures appears, some again and again. */
export function requests (count: number, seed: number): object[] {
  const next = seeded(seed)
  const url = (i: number): string => {
    const [width, height] = SIZES[i % SIZES.length]!
    return dataUrl(picture(seed * 1000 + i, width, height))
  }
  const list: object[] = []
  for (let fresh = 0; fresh < count;) {
    const parts: Part[] = []
    for (let i = next(4); i >= 0; i--) parts.push(imagePart(url(fresh > 0 && (next(4) === 0 || fresh >= count) ? next(fresh) : fresh++)))
    list.push(chat([...parts, textPart(WORDS[next(WORDS.length)]!)], { stream: next(2) === 0 }))
  }
  return list
}

/** The tokens, or what came in their place. */
function answerOf (told: Told): readonly number[] | Told {
  return told.tokens ?? told
}

/** Right answers, by the plain server. */
async function rightAnswers (house: House, bodies: readonly object[]): Promise<ReadonlyArray<readonly number[] | Told>> {
  const told: Told[] = []
  for (const body of bodies) told.push(await ask(house.plain, body))
  return told.map(answerOf)
}

async function allAlive (t: Test, { peers }: House, when: string): Promise<void> {
  for (const peer of peers) t.ok(await peer.alive(), `${peer.role} lives ${when}`)
}

/** `count` pictures, 1 to 4 a request, repeated, streamed or not, one after the other and four at a time. */
export async function equalsPlain (t: Test, house: House, { count, seed, plan, options = {} }: { count: number, seed: number, plan: string, options?: EpdOptions }): Promise<void> {
  const { url } = await gatewayBefore(t, house, options)
  const bodies = requests(count, seed)
  const right = await rightAnswers(house, bodies)
  for (const [i, body] of bodies.entries()) {
    const told = await ask(url, body)
    t.same(answerOf(told), right[i], `request ${i}: token for token`)
    t.equal(told.plan, plan)
  }
  const left = [...bodies.entries()]
  await Promise.all([1, 2, 3, 4].map(async () => {
    for (let one = left.shift(); one !== undefined; one = left.shift()) t.same(answerOf(await ask(url, one[1])), right[one[0]], `request ${one[0]} again, among others`)
  }))
  const text = chat([textPart('what is it')])
  t.same(answerOf(await ask(url, text)), answerOf(await ask(house.plain, text)), 'text alone')
  await allAlive(t, house, 'after all of them')
}

/** What a client may send to do harm. Each is refused. @param refused - the status; 503 where no node could take it */
export async function bearsMalice (t: Test, house: House, options: EpdOptions = {}, refused = /^400$/): Promise<void> {
  const { url } = await gatewayBefore(t, house, options)
  const small = dataUrl(picture(90, 56))
  const wide = dataUrl(picture(91, 112, 56))
  const honest = chat([imagePart(small), textPart('what is it')])
  const [right] = await rightAnswers(house, [honest])
  t.same(answerOf(await ask(url, honest)), right)
  const hostile: Record<string, object> = {
    'a foreign uuid': chat([imagePart(wide, 'taken'), textPart('what is it')]),
    'a uuid that leaves the folder': chat([imagePart(small, '../../x'), textPart('what is it')]),
    'a uuid too long for a file': chat([imagePart(small, 'u'.repeat(300)), textPart('what is it')]),
    'a uuid in place of a picture': chat([imagePart(null, 'taken'), textPart('what is it')]),
    'embeddings without a uuid': chat([embedsPart(undefined, [1, 4, 4]), textPart('what is it')]),
    'embeddings that do not exist': chat([embedsPart('missing', [1, 4, 4]), textPart('what is it')], { ec_transfer_params: {} }),
    'embeddings beside a picture': chat([embedsPart('missing', [1, 4, 4]), imagePart(small)]),
    ec_transfer_params: chat([imagePart(small), textPart('what is it')], { ec_transfer_params: { missing: { metadata: { image_grid_thw: [1, 4, 4] } } } }),
    kv_transfer_params: chat([textPart('what is it')], { kv_transfer_params: { do_remote_prefill: true, remote_engine_id: 'x', remote_block_ids: [[1]], remote_host: '127.0.0.1', remote_port: 9 } }),
    'no picture': chat([imagePart('data:image/png;base64,AAAA'), textPart('what is it')]),
    'no picture, streamed': chat([imagePart('data:image/png;base64,AAAA'), textPart('what is it')], { stream: true }),
    'a picture out of reach': chat([imagePart('http://127.0.0.1:9/x.png'), textPart('what is it')]),
    'a file': chat([imagePart('file:///etc/passwd'), textPart('what is it')])
  }
  for (const [what, body] of Object.entries(hostile)) {
    const told = await ask(url, body)
    t.match(String(told.status), refused, `${what}: refused`)
    t.match(told.error, { message: /.../ }, `${what}: clearly`)
    await allAlive(t, house, `after ${what}`)
  }
  t.same(await house.folder.outside(), [], 'nothing was written outside the folder')
  t.same(answerOf(await ask(url, honest)), right, 'and honest requests are served on')
}

/** E dies under the gateway: the language model encodes. E comes back: it is used again. */
export async function survivesEncoder (t: Test, house: House, seed: number): Promise<void> {
  const { url, healthy } = await gatewayBefore(t, house)
  const e = house.peers.find(peer => peer.role === 'encoder')!
  const bodies = requests(6, seed)
  const right = await rightAnswers(house, bodies)
  t.match((await ask(url, bodies[0]!)).plan, /^e-/)
  await e.kill!()
  for (const [i, body] of bodies.entries()) t.same(answerOf(await ask(url, body)), right[i], `request ${i} without E`)
  await e.start!()
  await healthy(e)
  await until(async () => {
    const told = await ask(url, bodies[0]!)
    t.same(answerOf(told), right[0])
    return told.plan?.startsWith('e-')
  }, 'E is used again', house.patience)
}

/** The server that answers dies: clear errors. It comes back with an empty cache, while files are gone: right answers. */
export async function survivesConsumer (t: Test, house: House, seed: number, options: EpdOptions = {}): Promise<void> {
  const { url, healthy } = await gatewayBefore(t, house, { retries: 1, ...options })
  const consumer = house.peers.find(peer => peer.role === 'hybrid' || peer.role === 'decode')!
  const bodies = requests(6, seed)
  const right = await rightAnswers(house, bodies)
  for (const [i, body] of bodies.entries()) t.same(answerOf(await ask(url, body)), right[i])
  await consumer.kill!()
  for (const body of bodies) {
    const told = await ask(url, body)
    t.ok(told.status >= 502 && told.status <= 504, `a ${told.status}`)
    t.match(told.error, { message: /.../ })
  }
  await house.folder.clear()
  await consumer.start!()
  await healthy(consumer)
  for (const [i, body] of bodies.entries()) t.same(answerOf(await ask(url, body)), right[i], `request ${i}, its files deleted`)
  await allAlive(t, house, 'after its files were deleted')
}

/** Many requests at once, before an encoder that has other things to do: the language model encodes what no encoder got. */
export async function sharesVisionWork (t: Test, house: House, seed: number): Promise<void> {
  const { url } = await gatewayBefore(t, house, { bypass: 'auto', routing: { smallItem: 0 }, vllm: { handoff: 'raw' } })
  const [first, ...bodies] = requests(60, seed)
  const right = await rightAnswers(house, bodies)
  // Its rate is known from here on.
  await ask(url, first!)
  const encoder = house.peers.find(peer => peer.role === 'encoder')!.url
  const consumer = house.peers.find(peer => peer.role === 'hybrid')!.url
  const told = await Promise.all(bodies.map(async body => await ask(url, body)))
  for (const [i, one] of told.entries()) t.same(answerOf(one), right[i], `request ${i}, among all others`)
  t.ok(told.some(({ encoders }) => encoders!.includes(encoder) && encoders!.includes(consumer)), 'two servers encode pictures of one request')
  t.match(told.map(({ reason }) => reason).join(), /on the language model/, 'the reason says how many went where')
  await allAlive(t, house, 'after all of them')
}

/** P dies: D computes the prompt itself. */
export async function survivesPrefill (t: Test, house: House, seed: number): Promise<void> {
  const { url } = await gatewayBefore(t, house, { routing: { disaggregate: 'always' } })
  const p = house.peers.find(peer => peer.role === 'prefill')!
  const bodies = requests(6, seed)
  const right = await rightAnswers(house, bodies)
  t.equal((await ask(url, bodies[0]!)).plan, 'e-p-d')
  await p.kill!()
  for (const [i, body] of bodies.entries()) t.same(answerOf(await ask(url, body)), right[i], `request ${i} without P`)
  for (const peer of house.peers) t.equal(await peer.alive(), peer !== p, `${peer.role} after P's death`)
}

/** D's turn comes when P may have given its blocks to others: the handle is thrown away, and D computes the prompt. @param age returns the hand-off past its lease */
export async function throwsOldHandlesAway (t: Test, house: House, seed: number, age: (handoff: Handoff) => Promise<Handoff>): Promise<void> {
  const vllm = createVllm()
  const late: Adapter = { ...vllm, name: 'late', prefill: async (job, call) => await age(await vllm.prefill(job, call)) }
  const { url } = await gatewayBefore(t, house, { adapters: [late], routing: { disaggregate: 'always' } }, 'late')
  const bodies = requests(2, seed)
  const right = await rightAnswers(house, bodies)
  for (const [i, body] of bodies.entries()) {
    t.same(answerOf(await ask(url, body)), right[i], `request ${i}, its handle too old`)
  }
  await allAlive(t, house, 'after handles were thrown away')
}

/** Files cut short, and a server that meets them first after a restart: a 0.32 server dies of it, with or without a gateway. One does, and no other. */
export async function losesOneToTruncatedFiles (t: Test, house: House, seed: number): Promise<void> {
  const { url, healthy } = await gatewayBefore(t, house)
  const consumers = house.peers.filter(peer => peer.role === 'hybrid')
  const [body] = requests(1, seed)
  const [right] = await rightAnswers(house, [body!])
  t.same(answerOf(await ask(url, body!)), right)
  await house.folder.truncate()
  for (const consumer of consumers) {
    await consumer.kill!()
    await consumer.start!()
  }
  await healthy(...consumers)
  const told = await ask(url, body!)
  if (told.tokens !== undefined) t.same(told.tokens, right)
  else t.match(told, { status: /^50[0234]$/, error: { message: /.../ } })
  const alive = await Promise.all(consumers.map(async consumer => await consumer.alive()))
  t.ok(alive.filter(lives => !lives).length <= 1, 'at most one server falls to one request')
}
