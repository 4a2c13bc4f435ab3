/** Pictures are looked at before a node that can't bear bad ones gets them. */
import { createServer, type RequestListener } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import sharp, { type Sharp } from 'sharp'
import t, { type Test } from 'tap'
import { TimeLimit } from '../../adapters/abort.ts'
import { resolveOptions, type EpdOptions } from '../../plugin/options/index.ts'
import { parseBody } from '../../plugin/body/index.ts'
import { MediaCheck } from '../../plugin/pipeline/index.ts'
import { bodyFrom } from '../helper/adapter-call.ts'
import { buildGateway, chat, post } from '../helper/fake-gateway.ts'
import { FakeSglangEncoder, FakeSglangLm } from '../helper/fake-sglang.ts'
import { pngHeader } from '../helper/png.ts'
import { until } from '../helper/until.ts'

const make = (width = 40, height = 30): Sharp => sharp({ create: { width, height, channels: 3, background: 'teal' } })
const dataUrl = (bytes: Buffer, type = 'image/png'): string => `data:${type};base64,${bytes.toString('base64')}`
const png = await make().png().toBuffer()
const jpeg = await make(400, 300).jpeg().toBuffer()

function check (t: Test, media: EpdOptions['media'] = {}): MediaCheck {
  const found = new MediaCheck(resolveOptions({ embedded: false, media }).media)
  t.teardown(async () => { await found.close() })
  return found
}

async function verdict (t: Test, url: string, media: EpdOptions['media'] = {}, limit = new TimeLimit(0)): Promise<string> {
  const body = await bodyFrom(chat('?', dataUrl(png), url))
  return await check(t, media).check(body, limit).then(() => 'good', (error: { code?: string, param?: string, message: string }) => `${error.code} ${error.param}: ${error.message}`)
}

async function server (t: Test, listener: RequestListener): Promise<string> {
  const server = createServer(listener).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}/p.png`
}

t.test('pictures of every format pass, whatever their data URL says, and leave the body as it is', async t => {
  const bmp = Buffer.concat([Buffer.from('BM'), Buffer.alloc(60)])
  const formats = [png, jpeg, await make().webp().toBuffer(), await make().gif().toBuffer(), await make().tiff().toBuffer(), await make().avif().toBuffer(), bmp]
  for (const bytes of formats) t.equal(await verdict(t, dataUrl(bytes, 'application/octet-stream')), 'good')
  t.equal(await verdict(t, png.toString('base64')), 'good', 'base64 without a header')
  const body = await bodyFrom(chat('?', dataUrl(png)))
  t.equal(await check(t).check(body, new TimeLimit(0)), body)
  const escaped = await parseBody(Buffer.from(JSON.stringify(chat('?', dataUrl(png))).replaceAll('/', '\\/')))
  t.equal(await check(t).check(escaped, new TimeLimit(0)), escaped)
})

t.test('what is no picture is a 400 that names the part', async t => {
  const svg = Buffer.from('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
  for (const [what, url, reason] of [
    ['three bytes', 'data:image/png;base64,AAAA', /can be decoded/],
    ['nothing', 'data:image/png;base64,', /can be decoded/],
    ['no URL', '', /has no URL/],
    ['a blank', ' ', /can be decoded/],
    ['a file that breaks off', dataUrl(jpeg.subarray(0, jpeg.length >> 1)), /can be decoded/],
    ['one bit', dataUrl(Buffer.concat([png.subarray(0, png.length - 20), Buffer.alloc(20)])), /can be decoded/],
    ['a drawing', dataUrl(svg, 'image/svg+xml'), /svg is no format/],
    ['a bomb', dataUrl(pngHeader(60_000, 60_000)), /pixels/],
    ['text', 'data:text/plain,hello', /base64/],
    ['a file', 'file:///etc/passwd', /data, http or https/],
    ['a path', '../../etc/passwd.png', /data, http or https/],
    ['another scheme', 'ftp://example.com/p.png', /data, http or https/]
  ] as const) {
    t.match(await verdict(t, url), new RegExp(`^EPD_ERR_INVALID_MEDIA messages\\[0\\]\\.content\\[1\\]: .*${reason.source}`), what)
  }
  t.match(await verdict(t, dataUrl(jpeg), { maxBytes: 100 }), /larger than 100 bytes/)
})

t.test('a picture behind an address is fetched once, and stands in the body from there on', async t => {
  let asked = 0
  const url = await server(t, (_request, response) => { asked++; response.setHeader('content-type', 'image/png').end(png) })
  const checked = await check(t, { allowPrivate: true }).check(await bodyFrom(chat('?', dataUrl(jpeg), url)), new TimeLimit(0))
  const { messages } = JSON.parse(Buffer.concat(checked.splice({})).toString()) as { messages: Array<{ content: Array<{ image_url?: { url: string } }> }> }
  t.same(messages[0]!.content.map(part => part.image_url?.url), [dataUrl(jpeg), dataUrl(png, 'application/octet-stream'), undefined])
  t.match(checked.media[1]!.size, { width: 40, height: 30 })
  t.equal(asked, 1)
})

t.test('addresses that lead nowhere, to no picture or to a private network', async t => {
  const allowed = { allowPrivate: true }
  t.match(await verdict(t, await server(t, (_request, response) => { response.end(png) })), /private/)
  t.match(await verdict(t, 'http://127.0.0.1:1/p.png', allowed), /connection failed/)
  t.match(await verdict(t, await server(t, (_request, response) => { response.writeHead(404).end() }), allowed), /answered 404/)
  t.match(await verdict(t, await server(t, (_request, response) => { response.setHeader('content-type', 'text/html').end('<p>') }), allowed), /text\/html/)
  t.match(await verdict(t, await server(t, (_request, response) => { response.end('no picture') }), allowed), /can be decoded/)
  t.match(await verdict(t, await server(t, () => {}), { ...allowed, timeout: 100 }), /longer than 100 ms/)
  const limit = new TimeLimit(0)
  const hanging = await server(t, () => { limit.abort(new Error('gone')) })
  t.match(await verdict(t, hanging, allowed, limit), /gone/)
})

t.test('of video and audio only the place is looked at', async t => {
  const of = async (url: string): Promise<string> => await check(t).check(await bodyFrom({ model: 'm', messages: [{ role: 'user', content: [{ type: 'video_url', video_url: { url } }] }] }), new TimeLimit(0)).then(() => 'good', (error: Error) => error.message)
  t.equal(await of('https://example.com/v.mp4'), 'good')
  t.equal(await of('data:video/mp4;base64,AAAA'), 'good')
  t.match(await of('/srv/v.mp4'), /data, http or https/)
})

t.test('a language server that a bad picture would end does not get it; the option of the node decides', async t => {
  const encoder = await FakeSglangEncoder.start(t)
  const [careful, careless] = [await FakeSglangLm.start(t, { encoderUrls: [encoder.url], model: 'careful' }), await FakeSglangLm.start(t, { encoderUrls: [encoder.url], model: 'careless', transfer: 'zmq_to_tokenizer' })]
  const { url, app } = await buildGateway(t, { options: { nodes: [{ url: careful.url, adapter: 'sglang' }, careless.spec] } })
  await until(() => app.epd.gateway.serves('careful') && app.epd.gateway.serves('careless'), 'both are known')
  const ask = async (model: string, picture: string): Promise<Response> => await post(`${url}/v1/chat/completions`, { ...chat('?', picture), model })
  const refused = await ask('careful', 'data:image/png;base64,AAAA')
  t.equal(refused.status, 400)
  t.match(await refused.json(), { error: { code: 'invalid_media', param: 'messages[0].content[0]' } })
  t.equal(careful.generations.length, 0)
  t.equal((await ask('careful', dataUrl(png))).status, 200)
  t.equal((await ask('careless', 'data:image/png;base64,AAAA')).status, 503, "the server's own answer")
  t.equal(careless.generations.length > 0, true)
})
