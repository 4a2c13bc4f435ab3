/** A gateway before the fake that replays vLLM's servers; `npm run test:vllm` asks the same of real ones. */
import t, { type Test } from 'tap'
import { FakeVllm, KvBlocks, SharedFolder, type VllmServer } from '../helper/fake-vllm.ts'
import { until } from '../helper/until.ts'
import { ask } from '../vllm/ask.ts'
import { chat, dataUrl, imagePart, picture, textPart } from '../vllm/pictures.ts'
import { bearsMalice, equalsPlain, gatewayBefore, losesOneToTruncatedFiles, requests, sharesVisionWork, survivesConsumer, survivesEncoder, survivesPrefill, throwsOldHandlesAway, type House, type Peer } from '../vllm/scenarios.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const PICTURES = FULL ? 40 : 16
const ROLES = { e: 'encoder', pd: 'hybrid', p: 'prefill', d: 'decode' } as const

interface FakeHouse extends House {
  readonly fakes: readonly FakeVllm[]
  readonly files: SharedFolder
  of (server: VllmServer): FakeVllm
}

async function house (t: Test, servers: ReadonlyArray<keyof typeof ROLES>): Promise<FakeHouse> {
  const files = new SharedFolder()
  const kv = new KvBlocks()
  const plain = await FakeVllm.start(t, { server: 'plain' })
  const fakes: FakeVllm[] = []
  for (const server of servers) fakes.push(await FakeVllm.start(t, { server, folder: files, kv }))
  return {
    plain: plain.url,
    fakes,
    files,
    of: server => fakes.find(fake => fake.server === server)!,
    peers: fakes.map((fake): Peer => ({
      url: fake.url,
      role: ROLES[fake.server as keyof typeof ROLES],
      alive: async () => fake.alive,
      kill: () => fake.kill(),
      start: () => fake.listen()
    })),
    folder: {
      clear: async () => { files.clear() },
      truncate: async () => { files.truncate() },
      outside: async () => files.outside
    },
    patience: 10_000
  }
}

const E_PD = ['e', 'pd'] as const
const E_P_D = ['e', 'p', 'd'] as const
const always = { routing: { disaggregate: 'always' } } as const

t.test(`E -> PD, raw: ${PICTURES} pictures equal the plain server, and PD loads what E has encoded`, async t => {
  const fakes = await house(t, E_PD)
  await equalsPlain(t, fakes, { count: PICTURES, seed: 1, plan: 'e-pd', options: { vllm: { handoff: 'raw' } } })
  t.ok(fakes.files.reads >= PICTURES, 'PD loads files')
  t.ok(fakes.of('pd').chats.every(({ body }) => !JSON.stringify(body).includes('image_embeds')))
  const encoded = fakes.of('e').chats.flatMap(({ body }) => body.messages!.flatMap(message => message.content as object[]))
  t.ok(encoded.length < 1.5 * PICTURES, `a repeated picture costs no call: ${encoded.length} were sent to E`)
})

t.test(`E -> PD, rewritten: ${PICTURES} pictures equal the plain server`, async t => {
  const fakes = await house(t, E_PD)
  await equalsPlain(t, fakes, { count: PICTURES, seed: 2, plan: 'e-pd', options: { vllm: { handoff: 'rewrite' } } })
  t.ok(fakes.of('pd').chats.some(({ body }) => JSON.stringify(body).includes('image_embeds')), 'without pixels')
})

t.test(`E -> P -> D: ${PICTURES} pictures equal the plain server`, async t => {
  const fakes = await house(t, E_P_D)
  await equalsPlain(t, fakes, { count: PICTURES, seed: 3, plan: 'e-p-d', options: { ...always, vllm: { handoff: 'raw' } } })
  t.ok(fakes.of('d').chats.every(({ body }) => body.kv_transfer_params != null), 'D pulls what P has computed')
})

for (const handoff of ['raw', 'rewrite'] as const) {
  t.test(`no client harms E and PD (${handoff})`, async t => { await bearsMalice(t, await house(t, E_PD), { vllm: { handoff } }) })
}

t.test('no client harms E, P and D', async t => { await bearsMalice(t, await house(t, E_P_D), always) })

t.test('E is killed', async t => { await survivesEncoder(t, await house(t, E_PD), 5) })

t.test('PD is killed, and files are deleted', async t => { await survivesConsumer(t, await house(t, E_PD), 6) })

t.test('many requests at once: PD encodes what E was not given', async t => {
  const fakes = await house(t, E_PD)
  const [e, pd] = [fakes.of('e'), fakes.of('pd')]
  const busy = { hold: (async () => { await until(() => e.chats.length > 5, 'requests wait for E') })() }
  e.faults.push({ hold: Promise.resolve() }, busy, busy, busy)
  // Until then PD's rate is unknown, so that who encodes what depends on tokens alone, and not on how fast this machine is.
  pd.faults.push({ hold: Promise.resolve() }, ...Array<typeof busy>(40).fill(busy))
  await sharesVisionWork(t, fakes, 4)
  const pictures = (fake: FakeVllm): number => fake.chats.reduce((sum, { body }) => sum + (JSON.stringify(body).match(/"uuid"/g)?.length ?? 0), 0)
  t.ok(pictures(e) < 60, 'E got some pictures only')
})

t.test('D is killed', async t => { await survivesConsumer(t, await house(t, E_P_D), 10, always) })

t.test('a handle is older than its lease', async t => {
  const fakes = await house(t, E_P_D)
  await throwsOldHandlesAway(t, fakes, 9, async handoff => {
    const wire = handoff.wire as { at: number }
    return { ...handoff, wire: { ...wire, at: wire.at - 30_000 } }
  })
  t.ok(fakes.of('d').chats.every(({ body }) => body.kv_transfer_params == null), 'D sees none')
})

t.test('P is killed', async t => { await survivesPrefill(t, await house(t, E_P_D), 7) })

t.test('files are truncated', async t => { await losesOneToTruncatedFiles(t, await house(t, ['e', 'pd', 'pd']), 8) })

t.test('a request that kills PD is not given to another', async t => {
  for (const stream of [false, true]) {
    const fakes = await house(t, ['e', 'pd', 'pd'])
    const { url } = await gatewayBefore(t, fakes)
    for (const fake of fakes.fakes) if (fake.server === 'pd') fake.faults.push('die')
    const told = await ask(url, chat([imagePart(dataUrl(picture(1, 56))), textPart('what is it')], { stream }))
    t.match(told.error, { message: /.../ }, 'a clear error')
    t.ok(told.status >= 500)
    t.equal(fakes.fakes.reduce((sum, fake) => sum + fake.deaths, 0), 1, 'one server falls')
  }
})

t.test('D never gets a body without pixels and without its handle', async t => {
  const fakes = await house(t, E_P_D)
  const { url } = await gatewayBefore(t, fakes, { ...always, vllm: { handoff: 'rewrite' } })
  const [body] = requests(1, 9)
  fakes.of('p').faults.push('reset', 'reset', 'reset')
  t.match(await ask(url, body!), { tokens: (await ask(fakes.plain, body!)).tokens }, 'P fails: D computes the prompt from the pictures')
  t.equal(fakes.of('d').deaths, 0)
})
