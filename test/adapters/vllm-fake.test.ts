/** The fake vLLM answers every recorded request as the real server did. */
import t from 'tap'
import { exchange, jsonOf, plainBody, statusOf, type Exchange } from '../vllm/exchange.ts'
import { FakeVllm, KvBlocks, recordings, SharedFolder, type VllmServer } from '../helper/fake-vllm.ts'
import { until } from '../helper/until.ts'

/** A value with what differs from answer to answer left out: ids, times, tokens, words, counts. */
function shapeOf (value: unknown, name = ''): unknown {
  if (['token_ids', 'prompt_token_ids', 'remote_block_ids'].includes(name)) return value === null ? null : 'list'
  if (Array.isArray(value)) return value.map(one => shapeOf(one))
  if (typeof value === 'object' && value !== null) {
    return Object.entries(value).map(([key, member]) => [/^[0-9a-f]{64}$/.test(key) ? 'hash' : key, shapeOf(member, key)])
  }
  if (['id', 'content', 'remote_engine_id', 'remote_request_id', 'system_fingerprint', 'x-request-id', 'date'].includes(name)) return typeof value
  return typeof value === 'number' && name !== 'code' ? 'number' : value
}

function headOf ({ head }: Exchange): string[] {
  return head.trimEnd().split('\r\n').map((line, i) => i === 0 ? line : line.split(': ')[0]!)
}

function bodyShape (one: Exchange): unknown {
  const text = plainBody(one.head, one.body)
  // How many tokens an event has is a matter of time: the last one stands for all.
  if (text.startsWith('data: ')) return text.split('\n\n').filter(event => !/"content":"[^"].*"finish_reason":null/.test(event)).map(event => event.startsWith('data: {') ? shapeOf(JSON.parse(event.slice(6))) : event)
  return text === '' ? '' : shapeOf(jsonOf(one))
}

t.test('every recorded answer, by the same request in the same order', async t => {
  const folder = new SharedFolder()
  const kv = new KvBlocks()
  const handles: unknown[] = []
  const servers = ['e', 'pd', 'plain', 'p', 'd'] as const
  const fakes = new Map<VllmServer, FakeVllm>()
  for (const server of servers) fakes.set(server, await FakeVllm.start(t, { server, folder, kv }))
  const isDeadly = (name: string): boolean => name.startsWith('deadly')
  const asked = servers.flatMap(server => Object.entries(recordings(server)).filter(([name]) => name !== 'idle').map(([name, real]) => ({ server, name, real })))
  for (const { server, name, real } of [...asked.filter(one => !isDeadly(one.name)), ...asked.filter(one => isDeadly(one.name))]) {
    const fake = fakes.get(server)!
    const { method, path, body } = real.request
    const handle = server === 'd' && name.startsWith('decode') ? { kv_transfer_params: handles.shift() } : {}
    const answer = await exchange(fake.url, { method, path, watchMs: real.closedAfterMs === null ? 5 : 3000, body: body === undefined || Array.isArray(body) ? body : { ...body, ...handle } })
    t.equal(statusOf(answer), statusOf(real), `${server} ${name}: status`)
    t.same(headOf(answer), headOf(real), `${server} ${name}: head`)
    t.same(bodyShape(answer), bodyShape(real), `${server} ${name}: body`)
    t.equal(answer.closedAfterMs === null, real.closedAfterMs === null, `${server} ${name}: what becomes of the connection`)
    if (server === 'p' && name.startsWith('prefill')) handles.push(jsonOf(answer).kv_transfer_params)
  }
  for (const dead of [fakes.get('pd')!, fakes.get('p')!]) {
    await until(() => !dead.alive, 'a server killed by a request refuses')
    t.equal(dead.deaths, 1)
    await t.rejects(exchange(dead.url, { path: '/health' }), { code: 'ECONNREFUSED' })
  }
})

t.test('a connection that idles is closed', async t => {
  const fake = new FakeVllm({ server: 'plain' })
  fake.keepAliveMs = 30
  await fake.listen()
  t.teardown(() => fake.kill())
  await exchange(fake.url, { path: '/health', watchMs: 10_000 })
  await until(() => fake.connections === 0, 'the server has closed the connection')
})
