/** Compressed request bodies, where options take them. */
import { gzipSync } from 'node:zlib'
import t from 'tap'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl } from '../helper/fake-gateway.ts'
import { repeatedZstd, storedZstd } from '../helper/zstd.ts'

const CHAT = '/v1/chat/completions'

async function send (url: string, body: Uint8Array, encoding: string): Promise<{ status: number, code: string | undefined }> {
  const answer = await fetch(url + CHAT, { method: 'POST', body: new Uint8Array(body), headers: { 'content-type': 'application/json', 'content-encoding': encoding } })
  const { error } = await answer.json() as { error?: { code: string, message: string } }
  if (error?.code === 'invalid_encoding') t.match(error.message, /content-encoding/)
  return { status: answer.status, code: error?.code }
}

const CODINGS = {
  gzip: { compress: (text: string) => gzipSync(text), bomb: gzipSync(' '.repeat(50_000_000)), other: 'zstd' },
  zstd: { compress: (text: string) => storedZstd(Buffer.from(text)), bomb: repeatedZstd(' ', 400), other: 'gzip' }
} as const

for (const [coding, { compress, bomb, other }] of Object.entries(CODINGS)) {
  t.test(`a body of ${coding} is read as what it stands for`, async t => {
    const nodes = [await FakeNode.start(t, { role: 'encoder' }), await FakeNode.start(t)]
    const { url, app } = await buildGateway(t, { nodes, options: { limits: { [coding]: true, body: 100_000 } } })
    const body = JSON.stringify(chat('?', pictureUrl(1)))
    const refused = { status: 400, code: 'invalid_encoding' }
    t.same(await send(url, compress(body), coding), { status: 200, code: undefined })
    t.match(nodes[1]!.generations[0]!.body, { model: 'vlm', messages: [{ content: [{}, { text: '?' }] }] })
    t.equal(nodes[1]!.generations[0]!.headers['content-encoding'], undefined)
    t.same(await send(url, compress(body), coding.toUpperCase()), { status: 200, code: undefined })
    t.same(await send(url, Buffer.from(body), 'identity'), { status: 200, code: undefined })
    t.same(await send(url, Buffer.from('not compressed at all'), coding), refused)
    t.same(await send(url, compress(body).subarray(0, 60), coding), refused, 'cut short')
    t.same(await send(url, compress('{'), coding), { status: 400, code: 'invalid_json' })
    t.same(await send(url, Buffer.from('x'), 'br'), { status: 415, code: 'unsupported_content_encoding' })
    t.same(await send(url, compress(body), other), { status: 415, code: 'unsupported_content_encoding' }, 'the other option is off')
    t.same(await send(url, bomb, coding), { status: 413, code: 'body_too_large' }, 'a bomb')
    const many = await Promise.all(Array.from({ length: 8 }, async (_, i) => (await send(url, i % 2 === 0 ? compress(body) : bomb, coding)).status))
    t.same(many, [200, 413, 200, 413, 200, 413, 200, 413], 'at the same time')
    t.equal(app.epd.gateway.inFlight, 0)
  })
}

t.test('without the options they are refused', async t => {
  const { url } = await buildGateway(t, { nodes: [await FakeNode.start(t)] })
  for (const [coding, { compress }] of Object.entries(CODINGS)) t.same(await send(url, compress(JSON.stringify(chat('?'))), coding), { status: 415, code: 'unsupported_content_encoding' })
})
