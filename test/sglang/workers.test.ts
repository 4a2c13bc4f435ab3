/** `serve --workers 2` before language servers of SGLang: their calls come to any worker, and meet at the one that has the request. */
import { join } from 'node:path'
import t from 'tap'
import { startCli } from '../helper/cli.ts'
import { chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { freePort } from '../helper/free-port.ts'
import { FakeSglangEncoder, FakeSglangLm, recorded } from '../helper/fake-sglang.ts'
import { until } from '../helper/until.ts'

t.test('encode calls meet their request at whichever worker it is', async t => {
  const encoders = [await FakeSglangEncoder.start(t), await FakeSglangEncoder.start(t)]
  const port = await freePort()
  const encoderUrls = [0, 1, 2, 3].map(n => `http://127.0.0.1:${port}/sglang/v/${n}`)
  const lms = [await FakeSglangLm.start(t, { transfer: 'zmq_to_scheduler', encoderUrls }), await FakeSglangLm.start(t, { transfer: 'zmq_to_tokenizer', encoderUrls })]
  const file = join(t.testdir({ 'epd.json': JSON.stringify({ nodes: [encoders[0]!.spec, ...lms.map(lm => lm.spec)] }) }), 'epd.json')
  const { url, stderr } = await startCli(t, ['serve', '--config', file, '--port', String(port), '--workers', '2'])
  const fresh = { headers: { connection: 'close' } }
  t.equal(await (await post(`${url}/register_encoder_url`, { url: encoders[1]!.url }, fresh)).text(), 'OK', 'encoders register at any worker')
  await until(async () => {
    const nodes = Object.values(await (await fetch(`${url}/nodes/status`)).json() as Record<string, { health: string }>)
    return nodes.length === 4 && nodes.every(({ health }) => health === 'healthy')
  }, 'all nodes are known')
  t.same((await (await fetch(`${url}/list_encoder_urls`)).json() as { encoder_urls: string[] }).encoder_urls.sort(), encoders.map(encoder => encoder.url).sort())
  const ask = async (...urls: string[]): Promise<Response> => await post(`${url}/v1/chat/completions`, { ...chat('?', ...urls), model: 'tiny' }, fresh)
  const workers = (): Set<unknown> => new Set([...stderr().matchAll(/"pid":(\d+)[^\n]*"msg":"request"/g)].map(found => found[1]))
  // Workers probe nodes themselves.
  for (let i = 0; i < 2; i++) await until(async () => (await ask(pictureUrl('first'))).headers.get('x-epd-plan') === 'e-pd', 'a worker knows them')
  for (let i = 0; i < 8 || (workers().size < 2 && i < 50); i++) {
    // Connections go to workers in turn, those of language servers too.
    if (i % 3 === 0) await fetch(`${url}/livez`, fresh)
    const answer = await ask(pictureUrl(i), pictureUrl(i + 1))
    t.equal(answer.status, 200)
    t.equal(answer.headers.get('x-epd-reason'), 'the language model calls encoders')
    t.equal(answer.headers.get('x-epd-encoders')?.split(',').length, 2, 'the worker of the request has seen its calls')
    await answer.text()
  }
  t.equal(workers().size, 2)
  t.same(lms.map(lm => lm.died), [undefined, undefined])

  const bad = await ask(pictureUrl('a'), 'data:image/png;base64,AAAA')
  t.equal(bad.status, 400)
  t.match(await bad.json(), { error: { code: 'invalid_media', param: 'messages[0].content[1]' } })

  // A part of no request of this gateway: its calls meet all the same.
  const { request } = recorded('scheduler_receive_url')
  for (let i = 0; i < 4; i++) {
    const said = await post(`${url}/sglang/v/${i}/scheduler_receive_url`, { ...request, req_id: 'stranger_local_part_0' }, fresh)
    t.equal(said.status, 200)
  }
  const refused = await post(`${url}/sglang/v/0/encode`, { ...recorded('encode').request, req_id: 'x' }, { headers: { ...fresh.headers, 'x-forwarded-for': '203.0.113.9' } })
  t.equal(refused.status, 403, 'for operators only')
})
