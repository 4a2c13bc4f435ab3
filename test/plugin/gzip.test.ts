/** Compressed request bodies, where the option takes them. */
import { gzipSync } from 'node:zlib'
import t from 'tap'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl } from '../helper/fake-gateway.ts'

const CHAT = '/v1/chat/completions'

async function send (url: string, body: Buffer, encoding = 'gzip'): Promise<{ status: number, code: string | undefined }> {
  const answer = await fetch(url + CHAT, { method: 'POST', body: new Uint8Array(body), headers: { 'content-type': 'application/json', 'content-encoding': encoding } })
  const { error } = await answer.json() as { error?: { code: string } }
  return { status: answer.status, code: error?.code }
}

t.test('a gzip body is read as what it stands for', async t => {
  const nodes = [await FakeNode.start(t, { role: 'encoder' }), await FakeNode.start(t)]
  const { url, app } = await buildGateway(t, { nodes, options: { limits: { gzip: true, body: 100_000 } } })
  const body = chat('?', pictureUrl(1))
  t.same(await send(url, gzipSync(JSON.stringify(body))), { status: 200, code: undefined })
  t.match(nodes[1]!.generations[0]!.body, { model: 'vlm', messages: [{ content: [{}, { text: '?' }] }] })
  t.equal(nodes[1]!.generations[0]!.headers['content-encoding'], undefined)
  t.same(await send(url, gzipSync(JSON.stringify(body)), 'X-Gzip'), { status: 200, code: undefined })
  t.same(await send(url, Buffer.from(JSON.stringify(body)), 'identity'), { status: 200, code: undefined })
  t.same(await send(url, Buffer.from('not gzip at all')), { status: 400, code: 'invalid_encoding' })
  t.same(await send(url, gzipSync(JSON.stringify(body)).subarray(0, 60)), { status: 400, code: 'invalid_encoding' }, 'cut short')
  t.same(await send(url, gzipSync('{')), { status: 400, code: 'invalid_json' })
  t.same(await send(url, Buffer.from('x'), 'br'), { status: 415, code: 'unsupported_content_encoding' })
  t.same(await send(url, gzipSync(' '.repeat(50_000_000))), { status: 413, code: 'body_too_large' }, 'a bomb')
  t.equal(app.epd.gateway.inFlight, 0)
})

t.test('without the option it is refused', async t => {
  const { url } = await buildGateway(t, { nodes: [await FakeNode.start(t)] })
  t.same(await send(url, gzipSync(JSON.stringify(chat('?')))), { status: 415, code: 'unsupported_content_encoding' })
})
