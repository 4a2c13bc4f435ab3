import { once } from 'node:events'
import { mkdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { createServer, type RequestListener, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import t, { type Test } from 'tap'
import { isPublicAddress } from '../../adapters/wire/media-fetch.ts'
import { Batcher } from '../../engines/encoder/batcher.ts'
import { MediaLoader, type MediaLoaderOptions } from '../../engines/encoder/index.ts'
import { until } from '../helper/until.ts'
import { checkIdle, harness, picture } from './harness.ts'

async function serve (t: Test, handler: RequestListener): Promise<{ server: Server, url: string, port: number }> {
  const server = createServer(handler)
  t.teardown(() => { server.closeAllConnections(); server.close() })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  return { server, port, url: `http://127.0.0.1:${port}` }
}

function loader (t: Test, policy: Partial<MediaLoaderOptions['policy']> = {}, options: Partial<MediaLoaderOptions> = {}): (url: string, signal?: AbortSignal) => Promise<Buffer> {
  const media = new MediaLoader({ policy: { allowPrivate: false, allowedDomains: [], ...policy }, ...options })
  t.teardown(() => media.close())
  return (url, signal = new AbortController().signal) => media.load({ kind: url.startsWith('file:') ? 'file' : 'http', url }, signal)
}

/** DNS that answers what the test says. */
function dns (answers: Record<string, string[]>, asked: string[] = []): NonNullable<MediaLoaderOptions['lookup']> {
  return ((host: string, _options: unknown, callback: (err: Error | null, found: unknown) => void) => {
    asked.push(host)
    const found = answers[host]
    if (found === undefined) callback(Object.assign(new Error('unknown'), { code: 'ENOTFOUND' }), [])
    else callback(null, found.map(address => ({ address, family: address.includes(':') ? 6 : 4 })))
  }) as unknown as NonNullable<MediaLoaderOptions['lookup']>
}

const REFUSED = { code: 'media_fetch_failed', message: /private or reserved address/ }

t.test('only public unicast addresses count as public', async t => {
  for (const address of ['8.8.8.8', '1.1.1.1', '172.32.0.1', '100.128.0.1', '2606:4700::1111', '2001:4860::8888']) t.ok(isPublicAddress(address), address)
  for (const address of [
    '0.0.0.0', '10.1.2.3', '100.64.0.1', '127.0.0.1', '127.255.0.1', '169.254.169.254', '172.16.0.1', '172.31.255.255', '192.0.0.8', '192.0.2.1', '192.168.1.1', '198.18.0.1', '198.51.100.7',
    '203.0.113.9', '224.0.0.1', '240.0.0.1', '255.255.255.255', '::', '::1', 'fe80::1', 'fc00::1', 'fd12::1', 'ff02::1', '::ffff:8.8.8.8', '::ffff:127.0.0.1', '64:ff9b::7f00:1', '2001:db8::1', '2002:7f00:1::', '2001::1',
    'localhost', ''
  ]) t.notOk(isPublicAddress(address), address)
})

t.test('private addresses are refused, however they are written', async t => {
  const { port } = await serve(t, (_req, res) => res.end('secret'))
  const asked: string[] = []
  const load = loader(t, {}, { lookup: dns({ 'inside.test': ['10.0.0.1'], 'mixed.test': ['8.8.8.8', '127.0.0.1'], localhost: ['127.0.0.1'] }, asked) })
  for (const host of ['127.0.0.1', '127.1', '2130706433', '0x7f.0.0.1', '0177.0.0.1', '[::1]', '[::ffff:127.0.0.1]', '0.0.0.0', '169.254.169.254', 'inside.test', 'mixed.test', 'localhost', '127.0.0.1.']) {
    await t.rejects(load(`http://${host}:${port}/x.png`), REFUSED, host)
  }
  t.same(asked, ['inside.test', 'mixed.test', 'localhost'], 'each name is resolved once')
  await t.rejects(load('http://nowhere.test/x.png'), { code: 'media_fetch_failed', message: /host is unknown/ })
  for (const url of ['http://user:pass@example.com/x', 'http://', 'http://exa mple/']) await t.rejects(load(url), { code: 'media_fetch_failed' })
})

t.test('the checked address is the one dialled: a connection asks once', async t => {
  const { port } = await serve(t, (_req, res) => res.end('bytes'))
  let asked = 0
  // A name that leads to this machine the first time it is asked for, and elsewhere from then on.
  const rebind = ((_host: string, _options: unknown, callback: (err: null, found: unknown) => void) => {
    callback(null, [{ address: asked++ === 0 ? '127.0.0.1' : '10.0.0.1', family: 4 }])
  }) as unknown as NonNullable<MediaLoaderOptions['lookup']>
  t.equal(String(await loader(t, { allowedDomains: ['media.test'] }, { lookup: rebind })(`http://media.test:${port}/`)), 'bytes')
  t.equal(asked, 1)
  await t.rejects(loader(t, {}, { lookup: rebind })(`http://media.test:${port}/`), REFUSED)
})

t.test('private hosts are fetched from when the operator allows it', async t => {
  const { port, url } = await serve(t, (_req, res) => { res.setHeader('content-type', 'image/png'); res.end('bytes') })
  t.equal(String(await loader(t, { allowPrivate: true })(url)), 'bytes')
  const lookup = dns({ 'media.test': ['127.0.0.1'], 'other.test': ['127.0.0.1'] })
  const named = loader(t, { allowedDomains: ['media.test'] }, { lookup })
  t.equal(String(await named(`http://media.test:${port}/`)), 'bytes', 'a named host may be private')
  await t.rejects(named(`http://other.test:${port}/`), { message: /not one of the allowed domains/ })
  await t.rejects(named(url), { message: /not one of the allowed domains/ })
})

t.test('redirects are followed three times, and each target is checked', async t => {
  const { port } = await serve(t, (req, res) => {
    const step = Number(req.url?.slice(1))
    if (req.url === '/private') res.writeHead(302, { location: 'http://10.0.0.1/x' }).end()
    else if (req.url === '/file') res.writeHead(301, { location: 'file:///etc/passwd' }).end()
    else if (req.url === '/bare') res.writeHead(302).end()
    else if (step > 0) res.writeHead(307, { location: `/${step - 1}` }).end('moved')
    else res.end('there')
  })
  const lookup = dns({ 'media.test': ['127.0.0.1'] })
  const load = loader(t, { allowedDomains: ['media.test', '10.0.0.1'] }, { lookup })
  t.equal(String(await load(`http://media.test:${port}/3`)), 'there')
  await t.rejects(load(`http://media.test:${port}/4`), { message: /redirects more than 3 times/ })
  const strict = loader(t, { allowedDomains: ['media.test'] }, { lookup })
  await t.rejects(strict(`http://media.test:${port}/private`), { message: /not one of the allowed domains/ })
  await t.rejects(strict(`http://media.test:${port}/file`), { message: /scheme other than http and https/ })
  await t.rejects(strict(`http://media.test:${port}/bare`), { message: /answered 302/ })
})

t.test('a redirect to a private address is refused, however it is written, and never dialled', async t => {
  const targets: string[] = []
  let hops = 0
  const { port } = await serve(t, (req, res) => {
    hops++
    if (req.url === '/start') res.writeHead(302, { location: targets[0] }).end()
    else res.end('secret')
  })
  // No test reaches a public server, so the first hop is let through as if it were one: permission ends with its answer.
  const policy = { get allowPrivate () { return hops === 0 }, allowedDomains: [] }
  const media = new MediaLoader({ policy, lookup: dns({ 'cdn.test': ['127.0.0.1'], 'inside.test': ['127.0.0.1'], 'mixed.test': ['8.8.8.8', '127.0.0.1'] }) })
  t.teardown(() => media.close())
  for (const target of [`http://127.0.0.1:${port}/x`, `http://127.1:${port}/x`, `http://2130706433:${port}/x`, `http://[::ffff:127.0.0.1]:${port}/x`, `http://inside.test:${port}/x`, `http://mixed.test:${port}/x`, 'http://169.254.169.254/latest/meta-data/', 'http://10.0.0.1/x']) {
    hops = 0
    targets[0] = target
    await t.rejects(media.load({ kind: 'http', url: `http://cdn.test:${port}/start` }, new AbortController().signal), REFUSED, target)
    t.equal(hops, 1, 'the server was asked once, for the redirect')
  }
})

t.test('answers that are no picture, too large, too slow or broken off are refused', async t => {
  const { url } = await serve(t, (req, res) => {
    if (req.url === '/html') res.writeHead(200, { 'content-type': 'text/html' }).end('<html>')
    else if (req.url === '/svg') res.writeHead(200, { 'content-type': 'image/svg+xml' }).end('<svg/>')
    else if (req.url === '/404') res.writeHead(404).end('no')
    else if (req.url === '/length') res.writeHead(200, { 'content-length': 5000 }).end(Buffer.alloc(5000))
    else if (req.url === '/chunked') { res.write(Buffer.alloc(800)); res.end(Buffer.alloc(800)) } else if (req.url === '/empty') res.end()
    else if (req.url === '/half') { res.writeHead(200, { 'content-length': 100 }); res.write('half'); setImmediate(() => res.destroy()) } else if (req.url === '/drip') res.write('x')
  })
  const load = loader(t, { allowPrivate: true }, { maxBytes: 1000, timeoutMs: 200 })
  const reasons: Record<string, RegExp> = {
    html: /says it is text\/html/, svg: /says it is image\/svg/, 404: /answered 404/, length: /larger than 1000/, chunked: /larger than 1000/, empty: /no bytes/, half: /connection failed/, drip: /took longer than 200 ms/, hang: /took longer than 200 ms/
  }
  for (const [path, message] of Object.entries(reasons)) await t.rejects(load(`${url}/${path}`), { code: 'media_fetch_failed', message }, path)
  await t.rejects(loader(t, { allowPrivate: true })('http://127.0.0.1:1/'), { message: /connection failed/ })
  const stop = new AbortController()
  const hanging = load(`${url}/hang`, stop.signal)
  stop.abort(new Error('client gone'))
  await t.rejects(hanging, { message: 'client gone' })
})

t.test('files are read below the allowed folder only, links out of it included', async t => {
  const dir = t.testdir({ media: { 'a.png': 'picture', deep: { 'b.png': 'deeper' } }, 'secret.txt': 'secret', 'media-other': { 'c.png': 'x' } })
  const media = join(dir, 'media')
  symlinkSync(join(dir, 'secret.txt'), join(media, 'link.png'))
  symlinkSync(dir, join(media, 'up'))
  symlinkSync(join(media, 'a.png'), join(media, 'inside.png'))
  writeFileSync(join(media, 'big.png'), Buffer.alloc(2000))
  mkdirSync(join(media, 'folder.png'))
  const load = loader(t, { directory: media }, { maxBytes: 1000 })
  const read = async (path: string): Promise<string> => String(await load(pathToFileURL(path).href))
  t.equal(await read(join(media, 'a.png')), 'picture')
  t.equal(await read(join(media, 'deep', 'b.png')), 'deeper')
  t.equal(await read(join(media, 'inside.png')), 'picture')
  const refused = { code: 'invalid_media', message: /not in the folder media may come from/ }
  for (const path of ['link.png', 'up/secret.txt', '../secret.txt', '../media-other/c.png', 'folder.png', 'none.png']) await t.rejects(load(`${pathToFileURL(media).href}/${path}`), refused, path)
  await t.rejects(load('file:///etc/passwd'), refused)
  await t.rejects(load('file://somewhere/etc/passwd'), refused)
  await t.rejects(load(`${pathToFileURL(media).href}/a%00.png`), refused)
  await t.rejects(read(join(media, 'big.png')), { message: /larger than 1000 bytes/ })
  await t.rejects(loader(t)(pathToFileURL(join(media, 'a.png')).href), { message: /not allowed/ })
})

t.test('a picture changed behind the same URL is encoded anew', async t => {
  let current = await picture(1)
  const { url } = await serve(t, (_req, res) => { res.setHeader('content-type', 'image/png'); res.end(current) })
  const h = await harness(t, { media: { allowPrivate: true, allowedDomains: [] } })
  const part = { type: 'image_url', image_url: { url: `${url}/picture.png` } }
  const [first] = await h.chat([part])
  const [second] = await h.chat([part])
  current = await picture(2)
  const [third] = await h.chat([part])
  t.same([first?.cached, second?.cached, third?.cached], [false, true, false])
  t.not(third?.content_hash, first?.content_hash)
  t.equal(h.counters.encodedItems, 2)
  h.ack([first, second, third].filter(r => r !== undefined))
  checkIdle(t, h)
})

t.test('a batch starts at once when nothing else is coming, and waits a moment when something is', async t => {
  const runs: number[][] = []
  let finish: () => void = () => {}
  let expected = 0
  const items = Array.from({ length: 9 }, (_, id) => ({ id, units: id === 8 ? 99 : 2, key: id === 7 ? 'b' : 'a' }))
  const batcher = new Batcher<typeof items[number]>({ maxItems: 3, maxUnits: 8, maxWindowMs: 5 }, () => expected, async batch => {
    runs.push(batch.map(item => item.id))
    await new Promise<void>(resolve => { finish = resolve })
  })
  const add = (...ids: number[]): void => { for (const id of ids) batcher.add(items[id] as typeof items[number]) }
  add(0)
  t.same(runs, [[0]], 'idle: no wait')
  add(1, 2, 3, 4)
  t.equal(batcher.queued, 4)
  t.ok(batcher.drop(items[2] as typeof items[number]))
  t.notOk(batcher.drop(items[0] as typeof items[number]), 'what runs is not dropped')
  const next = async (): Promise<void> => { const before = runs.length; finish(); await until(() => runs.length > before, 'the next run') }
  await next()
  t.same(runs.at(-1), [1, 3, 4], 'as many as the limit allows')
  add(8, 5, 7, 6)
  await next()
  t.same(runs.at(-1), [8], 'one with more units than fit runs alone')
  await next()
  t.same(runs.at(-1), [5], 'other shapes never share a run')
  await next()
  t.same(runs.at(-1), [7])
  await next()
  t.same(runs.at(-1), [6])
  finish()
  await until(() => !batcher.running, 'the last run ends')
  expected = 1
  add(0)
  t.equal(runs.length, 6, 'it waits for what is being prepared')
  add(1)
  await until(() => runs.length === 7, 'the window ends')
  t.same(runs.at(-1), [0, 1])
  finish()
})
