/** Two gateways beside each other, behind a real nginx with deploy/nginx.conf. */
import { join } from 'node:path'
import t from 'tap'
import { startCli } from '../helper/cli.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { freePort } from '../helper/free-port.ts'
import { CHUNK, modelServer, well, type Script } from '../helper/model-server.ts'
import { startNginx } from '../helper/nginx.ts'
import { until } from '../helper/until.ts'

const CHAT = '/v1/chat/completions'
const TEXT = { model: 'm', messages: [{ role: 'user', content: 'Hello' }] }

/** What is done to a gateway comes in the middle of answers, and clients leave it the processor. */
const slowly: Script = (request, response, body, server) => {
  if (body.stream === true) response.writeHead(200, { 'content-type': 'text/event-stream' }).write(CHUNK)
  setTimeout(() => {
    if (body.stream === true) response.end(`${CHUNK}data: [DONE]\n\n`)
    else well(request, response, body, server)
  }, 100)
}

t.test('they send the same picture to the same encoder', async t => {
  const nodes = [...await Promise.all(Array.from({ length: 4 }, async () => await FakeNode.start(t, { role: 'encoder' }))), await FakeNode.start(t)]
  const [one, two] = [await buildGateway(t, { nodes }), await buildGateway(t, { nodes: [...nodes].reverse() })]
  const encoderOf = async (url: string, i: number): Promise<string | null> => (await post(url + CHAT, chat('?', pictureUrl(i)))).headers.get('x-epd-encoders')
  const used = new Set<string | null>()
  for (let i = 0; i < 12; i++) {
    const encoder = await encoderOf(one.url, i)
    used.add(encoder)
    t.equal(await encoderOf(two.url, i), encoder)
  }
  t.ok(used.size > 1, 'not all at one')
})

const ROUNDS = process.env.EPD_TEST_FULL === '1' ? 3 : 1

t.test('a rolling restart of two gateways with two workers each loses no request under load, and whole answers outlive a gateway that is killed', async t => {
  const node = await modelServer(t, slowly)
  const file = join(t.testdir({ 'epd.yaml': `nodes: [{ url: "${node.url}", adapter: openai }]\nserver: { accessLog: false }\n` }), 'epd.yaml')
  const ports = [await freePort(), await freePort()] as const
  const start = async (i: 0 | 1): ReturnType<typeof startCli> => {
    const gateway = await startCli(t, ['serve', '--config', file, '--port', String(ports[i]), '--workers', '2', '--log-level', 'error'])
    await until(async () => (await fetch(`${gateway.url}/readyz`)).ok, 'the gateway is ready', 60_000, 20)
    return gateway
  }
  const gateways = [await start(0), await start(1)]
  const url = await startNginx(t, ports)
  const ending = new AbortController()
  const seen = { streams: new Map<string, number>(), answers: new Map<string, number>() }
  const asked: Array<Promise<Response>> = []
  const clients = Array.from({ length: 6 }, async (_, i) => {
    const stream = i % 2 === 0
    const counts = stream ? seen.streams : seen.answers
    while (!ending.signal.aborted) {
      asked[i] = post(url + CHAT, { ...TEXT, stream }).catch((err: unknown) => new Response(String(err), { status: 599 }))
      const answer = await asked[i]!
      const text = await answer.text().catch(String)
      const whole = answer.status === 200 && (stream ? text.endsWith('data: [DONE]\n\n') && !text.includes('error') : text.includes('Hello'))
      const what = whole ? 'whole' : `${answer.status} ${text.slice(0, 200)}`
      counts.set(what, (counts.get(what) ?? 0) + 1)
    }
  })
  for (let round = 0; round < ROUNDS; round++) {
    for (const i of [0, 1] as const) {
      t.equal(await gateways[i]!.stop(), 0)
      gateways[i] = await start(i)
    }
  }
  t.same([[...seen.streams.keys()], [...seen.answers.keys()]], [['whole'], ['whole']], 'a rolling restart loses none')
  // Who has found the second gateway in its restart has only the first one.
  await Promise.all(asked)
  await gateways[0]!.stop('SIGKILL')
  const before = seen.answers.get('whole')!
  await until(() => seen.answers.get('whole')! > before + 10, 'the other one serves all')
  ending.abort()
  await Promise.all(clients)
  t.same([...seen.answers.keys()], ['whole'], 'of a gateway that is killed, only streams that had begun end early')
  t.comment(`${seen.streams.get('whole')} streams, ${seen.answers.get('whole')} answers`)
})
