import { once } from 'node:events'
import { createServer, request as httpRequest } from 'node:http'
import type { IncomingMessage, OutgoingHttpHeaders } from 'node:http'
import { connect } from 'node:net'
import type { AddressInfo, Socket } from 'node:net'
import { PassThrough, Readable } from 'node:stream'
import t from 'tap'
import type { Test } from 'tap'
import { parseBody, readBody } from '../../plugin/body/index.ts'
import { describeMedia } from '../../plugin/body/media.ts'
import { freeFor } from '../../plugin/body/recycle.ts'
import type { EpdError } from '../../plugin/errors.ts'
import { bmp, gif, jpeg, png, webpExtended, webpLossless, webpLossy } from './picture-headers.ts'

const MIB = 1 << 20

/** A server that reads one body and answers what it made of it. */
async function reader (t: Test, limit: number): Promise<{ port: number, outcome: Promise<Buffer | EpdError> }> {
  let settle!: (outcome: Buffer | EpdError) => void
  const outcome = new Promise<Buffer | EpdError>(resolve => { settle = resolve })
  const server = createServer((request, response) => {
    readBody(request, { limit }).then(settle, settle).finally(() => response.end())
  })
  t.teardown(() => { server.close(); server.closeAllConnections() })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return { port: (server.address() as AddressInfo).port, outcome }
}

async function post (port: number, headers: OutgoingHttpHeaders, parts: Buffer[]): Promise<void> {
  const request = httpRequest({ port, host: '127.0.0.1', method: 'POST', headers, agent: false })
  for (const part of parts) request.write(part)
  request.end()
  const [response] = await once(request, 'response') as [IncomingMessage]
  response.resume()
}

const big = Buffer.from(Array.from({ length: 9 * MIB }, (_, i) => (i * 7 + (i >> 13)) & 0xff))

t.test('reads bodies of known and unknown length whole', async t => {
  for (const body of [Buffer.alloc(0), Buffer.from('{}'), big.subarray(0, 70_000), big]) {
    for (const headers of [{ 'content-length': body.length }, { 'transfer-encoding': 'chunked' }]) {
      const { port, outcome } = await reader(t, 16 * MIB)
      await post(port, headers, body.length > 100 ? [body.subarray(0, 99), body.subarray(99)] : [body])
      t.ok(body.equals(await outcome as Buffer), `${body.length} bytes, ${Object.keys(headers).join()}`)
    }
  }
})

t.test('takes a stream that stands in front of the request', async t => {
  const through = Object.assign(Readable.from([Buffer.from('ab'), Buffer.from('c')]), { headers: { 'content-length': '3' } })
  t.equal((await readBody(through, { limit: 10 })).toString(), 'abc')
  const text = Object.assign(new PassThrough({ encoding: 'utf8' }), { headers: {} })
  text.end('\u00e4')
  t.equal((await readBody(text, { limit: 10 })).toString(), '\u00e4')
  const longer = Object.assign(Readable.from([Buffer.from('abcd')]), { headers: { 'content-length': '3' } })
  await t.rejects(readBody(longer, { limit: 10 }), { code: 'EPD_ERR_INVALID_JSON' })
  const mine = Buffer.alloc(5 * MIB, 1)
  const kept = Object.assign(Readable.from([mine]), { headers: { 'content-length': String(mine.length) } })
  await readBody(kept, { limit: 10 * MIB })
  t.equal(mine.length, 5 * MIB, 'buffers of others are not given back')
})

t.test('frees the chunks of a large body as soon as they are copied, and no memory of others', async t => {
  const lengths: number[] = []
  const server = createServer((request, response) => {
    const free = freeFor(request)!
    request.on('data', (chunk: Buffer) => {
      free(chunk)
      lengths.push(chunk.length)
    })
    request.on('end', () => {
      t.equal(freeFor(request), undefined, 'another listener may have kept them')
      const part = Buffer.alloc(64 * 1024).subarray(1)
      free(part)
      t.equal(part.length, 64 * 1024 - 1, 'a slice is left alone')
      response.end()
    })
    request.on('data', () => {})
  })
  t.teardown(() => { server.close(); server.closeAllConnections() })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  await post((server.address() as AddressInfo).port, { 'content-length': big.length }, [big])
  t.ok(lengths.length > 0 && lengths.every(length => length === 0), `${lengths.length} chunks`)
  t.equal(freeFor(Readable.from([])), undefined, 'a stream in front of the request')
})

t.test('who else listens to the request keeps its chunks, of known and unknown length', async t => {
  for (const headers of [{ 'content-length': big.length }, { 'transfer-encoding': 'chunked' }]) {
    const kept: Buffer[] = []
    const server = createServer((request, response) => {
      const collect = (chunk: Buffer): void => { kept.push(chunk) }
      request.on('data', collect).once('end', () => { request.off('data', collect) })
      readBody(request, { limit: 16 * MIB }).finally(() => response.end())
    })
    t.teardown(() => { server.close(); server.closeAllConnections() })
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    await post((server.address() as AddressInfo).port, headers, [big])
    t.ok(big.equals(Buffer.concat(kept.filter(chunk => chunk.length > 0))), Object.keys(headers).join())
  }
})

t.test('refuses bodies over the limit', async t => {
  for (const headers of [{ 'content-length': 2000 }, { 'transfer-encoding': 'chunked' }]) {
    const { port, outcome } = await reader(t, 1999)
    await post(port, headers, [big.subarray(0, 1000), big.subarray(1000, 2000)]).catch(() => {})
    t.match(await outcome, { statusCode: 413, clientCode: 'body_too_large' })
  }
})

t.test('refuses compressed bodies', async t => {
  for (const [encoding, ok] of [['gzip', false], ['br, gzip', false], ['identity', true], ['Identity', true]] as const) {
    const { port, outcome } = await reader(t, 1999)
    await post(port, { 'content-encoding': encoding, 'content-length': 2 }, [Buffer.from('{}')]).catch(() => {})
    if (ok) t.equal((await outcome as Buffer).toString(), '{}')
    else t.match(await outcome, { statusCode: 415, clientCode: 'unsupported_content_encoding' })
  }
})

t.test('notices that the client is gone', async t => {
  for (const framing of ['content-length: 100', 'transfer-encoding: chunked']) {
    for (const leave of [(socket: Socket) => socket.resetAndDestroy(), (socket: Socket) => socket.end()]) {
      const { port, outcome } = await reader(t, 1999)
      const socket = connect(port, '127.0.0.1')
      socket.on('error', () => {})
      socket.write(`POST / HTTP/1.1\r\nhost: x\r\n${framing}\r\n\r\n5\r\nabcde\r\n`)
      await once(socket, 'connect')
      setImmediate(leave, socket)
      t.match(await outcome, { statusCode: 499, clientCode: 'client_closed' }, framing)
    }
  }
  const gone = Object.assign(new PassThrough(), { headers: {} })
  gone.destroy()
  await t.rejects(readBody(gone, { limit: 1 }), { code: 'EPD_ERR_CLIENT_CLOSED_REQUEST' })
})

t.test('reads the size of inline pictures from a few bytes', async t => {
  const deep = jpeg(4000, 3000, 300_000)
  const pictures: Array<[string, Buffer, [number, number] | undefined]> = [
    ['png', png(640, 480), [640, 480]], ['gif', gif(320, 200), [320, 200]], ['bmp', bmp(320, 200), [320, 200]], ['webp lossy', webpLossy(1000, 700), [1000, 700]],
    ['webp lossless', webpLossless(5000, 3), [5000, 3]], ['webp extended', webpExtended(70_000, 9), [70_000, 9]],
    ['jpeg', jpeg(1344, 768, 0), [1344, 768]], ['jpeg with big profiles', deep, [4000, 3000]],
    ['truncated jpeg', deep.subarray(0, 1000), undefined], ['text', Buffer.from('not a picture at all'), undefined], ['nothing', Buffer.alloc(0), undefined],
    ['no pixels', png(0, 5), undefined]
  ]
  for (const [name, bytes, size] of pictures) {
    const base64 = bytes.toString('base64')
    for (const url of [`data:image/x;base64,${base64}`, `DATA:image/x;charset=a;base64,${base64}`, base64]) {
      const body = await parseBody(Buffer.from(JSON.stringify({ model: 'm', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url } }] }] })))
      t.strictSame(body.media[0]!.size, size === undefined ? undefined : { width: size[0], height: size[1] }, name)
      t.equal(body.media[0]!.tokens, size === undefined ? 1024 : Math.min(16384, Math.max(1, Math.round(size[0] * size[1] / 784))))
    }
  }
  const slashes = `{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":"data:image\\/jpeg;base64,${jpeg(1344, 768, 20_000).toString('base64').replaceAll('/', '\\/')}"},
    {"type":"image_url","image_url":"data:image/png,${png(1, 1).toString('latin1').replace(/[^a-z]/g, '')}"},{"type":"image_url","image_url":"https://x/y.png"},
    {"type":"video_url","video_url":"data:video/jpeg;base64,${png(5, 5).toString('base64')}"}]}]}`
  const body = await parseBody(Buffer.from(slashes))
  t.strictSame(body.media.map(({ size, modality }) => [size, modality]), [[{ width: 1344, height: 768 }, 'image'], [undefined, 'image'], [undefined, 'image'], [undefined, 'video']])
  t.strictSame(body.media.map(item => item.tokens), [1317, 1024, 1024, 8192])
})

t.test('other work gets its turn while a big body is scanned', async t => {
  const numbers = Buffer.from(JSON.stringify({ model: 'm', prompt: Array.from({ length: 2_000_000 }, (_, i) => i) }))
  const escapes = Buffer.from(JSON.stringify({ model: 'm', prompt: 'a\n'.repeat(4 * MIB) }))
  for (const bytes of [numbers, escapes]) {
    let turns = 0
    let over = false
    const turn = (): void => {
      turns++
      if (!over) setImmediate(turn)
    }
    setImmediate(turn)
    await parseBody(bytes)
    over = true
    // `npm run bench -- body` measures the times.
    t.ok(turns >= 2, `${bytes.length} bytes: ${turns} turns`)
  }
})

t.test('other work gets its turn while the sizes of many escaped pictures are read', async t => {
  const bytes = Buffer.from('data:image/jpeg;base64,\\/9j\\/' + '\\u0041'.repeat(10_900))
  const span = { start: 0, end: bytes.length }
  const part = { message: 0, part: 0, path: '', type: 'image_url', url: { ...span, escaped: true }, member: 'image_url', span, apart: false }
  let done = false
  const describing = describeMedia(bytes, Array(100).fill(part)).finally(() => { done = true })
  await new Promise(resolve => { setImmediate(resolve) })
  t.notOk(done)
  t.equal((await describing).length, 100)
})
