/** Requests that are handed to a node as they are: those without a model, forms, and the cards of models. */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createServer, request as httpRequest, type IncomingHttpHeaders, type IncomingMessage } from 'node:http'
import type { AddressInfo } from 'node:net'
import { buffer } from 'node:stream/consumers'
import t, { type Test } from 'tap'
import { startCli } from '../helper/cli.ts'
import { CONTROL_FIELDS } from '../../plugin/body/index.ts'
import { resolveOptions } from '../../plugin/index.ts'
import { buildGateway, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { seededRandom } from '../helper/pictures.ts'
import { tempFile } from '../helper/temp.ts'
import { until } from '../helper/until.ts'

interface Seen { readonly method: string, readonly url: string, readonly headers: IncomingHttpHeaders, readonly body: Buffer }

/** An OpenAI-compatible server that notes what it gets. */
async function server (t: Test, card: { readonly id: string }): Promise<{ readonly url: string, readonly seen: Seen[] }> {
  const seen: Seen[] = []
  const http = createServer(async (request, response) => {
    response.setHeader('content-type', 'application/json')
    if (request.url === '/v1/models') { response.end(JSON.stringify({ object: 'list', data: [card] })); return }
    const body = await buffer(request)
    if (request.url !== '/health') seen.push({ method: request.method!, url: request.url!, headers: request.headers, body })
    response.end(JSON.stringify({ by: card.id }))
  }).listen(0, '127.0.0.1')
  t.teardown(() => { http.closeAllConnections(); http.close() })
  await once(http, 'listening')
  return { url: `http://127.0.0.1:${(http.address() as AddressInfo).port}`, seen }
}

async function gatewayOver (t: Test, ...servers: ReadonlyArray<{ readonly url: string }>): Promise<string> {
  const { app, url } = await buildGateway(t, { options: { nodes: servers.map(({ url }) => ({ url, adapter: 'openai' })) } })
  await app.epd.nodes.waitFor(({ models }) => models.length === servers.length, { signal: AbortSignal.timeout(10_000) })
  return url
}

t.test('a POST that names no model reaches a node, byte for byte', async t => {
  const one = await server(t, { id: 'm' })
  const url = await gatewayOver(t, one)
  const rows: Array<[string, string | undefined]> = [['/v1/responses/resp_1/cancel', undefined], ['/v1/responses/resp_1/cancel', ''], ['/v1/responses/resp_1/cancel', '{}'], ['/v1/load_lora_adapter', '{"lora_name":"a", "lora_path":"b"}'],
    ['/v1/files?purpose=x', '{ "input" : [1, 2.50] }']]
  for (const [path, body] of rows) {
    const answer = await fetch(url + path, { method: 'POST', ...(body === undefined ? {} : { body, headers: { 'content-type': 'application/json' } }) })
    t.equal(answer.status, 200, `${path} ${body}`)
    t.match(one.seen.at(-1), { method: 'POST', url: path })
    t.equal(one.seen.at(-1)!.body.toString(), body ?? '')
  }
  const before = one.seen.length
  for (const path of ['/v1/chat/completions', '/v1/completions', '/v1/responses', '/v1/messages']) {
    const answer = await post(url + path, { messages: [] })
    t.equal(answer.status, 400, path)
    t.match(await answer.json(), { error: { code: 'missing_value', param: 'model' } })
  }
  t.equal((await post(`${url}/v1/load_lora_adapter`, undefined, { body: '{"a":' })).status, 400, 'a body that is no JSON goes nowhere')
  t.equal(one.seen.length, before)
})

/** Ways to write a path of the API that some server or proxy takes for the plain one. */
function * spellings (path: string): Generator<string> {
  for (const slash of ['//', '%2F', '%2f', '%252F', '/;/', ';x=1/', '%5C']) yield path.replace(/(?<=.)\/(?!.*\/)/, slash)
  const last = path.lastIndexOf('/') + 1
  for (const encoded of [`%${path.charCodeAt(last).toString(16)}`, `%25${path.charCodeAt(last).toString(16)}`]) yield path.slice(0, last) + encoded + path.slice(last + 1)
  for (const tail of ['', '/', '//', '%2F', ';x', '?x=/v1/files', '/?x=1', '#x', '%23x', '%3Fx', '%0A', '%20']) yield path + tail
}

/** By a client that walks no path and leaves `#` where it is. */
async function raw (url: string, path: string, body: unknown, headers: Record<string, string> = {}): Promise<{ readonly status: number, readonly text: string }> {
  const request = httpRequest(url, { method: 'POST', path, headers: { 'content-type': 'application/json', ...headers } })
  request.end(JSON.stringify(body))
  const [response] = await once(request, 'response') as [IncomingMessage]
  return { status: response.statusCode!, text: (await buffer(response)).toString() }
}

t.test('a prompt without a model is refused, however its path is spelled', async t => {
  const one = await server(t, { id: 'm' })
  const url = await gatewayOver(t, one)
  let refused = 0
  for (const path of ['/v1/chat/completions', '/v1/completions', '/v1/responses', '/v1/messages', '/pooling']) {
    for (const spelled of spellings(path)) {
      const { status, text } = await raw(url, spelled, { messages: [] })
      if (status === 400 && text.includes('missing_value')) refused++
      else if (status !== 404) t.fail(`${spelled}: ${status} ${text}`)
    }
  }
  t.ok(refused > 60, `${refused} are routes`)
  t.same(one.seen, [])
})

t.test('no control field reaches a node without a model either, and what else is sent does', async t => {
  const one = await server(t, { id: 'm' })
  const url = await gatewayOver(t, one)
  for (const path of ['/v1/embeddings', '/v1//embeddings', '/v1/%65mbeddings', '/tokenize', '/v1/files/x']) {
    for (const name of CONTROL_FIELDS) {
      t.equal((await raw(url, path, { input: 'x', [name]: { a: 1 }, last: 1 })).status, 200, `${path} ${name}`)
      t.same(JSON.parse(one.seen.at(-1)!.body.toString()), { input: 'x', last: 1 })
    }
  }
  const before = one.seen.length
  const bodies = {
    'a picture': { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'http://10.0.0.1/x.png' } }] }] },
    'a lease': { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'epd:lease' } }] }] },
    embeddings: { prompt_embeds: 'AAAA' }
  }
  for (const [name, body] of Object.entries(bodies)) t.equal((await raw(url, '/tokenize', body)).status, 400, name)
  t.equal(one.seen.length, before)
})

t.test("a key's tokens a minute count without a model too", async t => {
  const one = await server(t, { id: 'm' })
  const hash = `sha256:${createHash('sha256').update('secret').digest('hex')}`
  const { app, url } = await buildGateway(t, { options: { nodes: [{ url: one.url, adapter: 'openai' }], keys: [{ name: 'k', hash, tokens: 100 }] } })
  await app.epd.nodes.waitFor(({ models }) => models.length === 1)
  const statuses: number[] = []
  for (let i = 0; i < 3; i++) statuses.push((await raw(url, '/v1/embeddings', { input: 'word '.repeat(50) }, { authorization: 'Bearer secret' })).status)
  t.same(statuses, [200, 429, 429])
})

/** A form with its model among other fields and files, whose bytes look like fields. */
function form (random: () => number, model: string | undefined): { readonly type: string, readonly bytes: Buffer } {
  const boundary = `${'-'.repeat(Math.floor(random() * 20))}b${Math.floor(random() * 1e9)}`
  const quoted = random() < 0.5
  const part = (head: string, value: Buffer | string): Buffer => Buffer.concat([Buffer.from(`--${boundary}\r\n${head}\r\n\r\n`), Buffer.from(value), Buffer.from('\r\n')])
  const decoy = Buffer.concat([Buffer.from(Array.from({ length: 200 }, () => Math.floor(random() * 256))), Buffer.from('\r\nContent-Disposition: form-data; name="model"\r\n\r\nwrong\r\n--no\r\n')])
  const parts = [
    part('Content-Disposition: form-data; name="file"; filename="model"\r\nContent-Type: audio/wav', decoy),
    part('content-disposition: form-data; name="model_name"', 'wrong'),
    part('Content-Disposition: form-data; name="language"', 'name="model"'),
    ...(model === undefined ? [] : [part(random() < 0.5 ? 'Content-Disposition: form-data; name="model"' : 'content-type: text/plain\r\nContent-Transfer-Encoding: 8bit\r\ncontent-disposition: form-data; name=model', model)])
  ].map(value => ({ value, key: random() })).sort((a, b) => a.key - b.key).map(({ value }) => value)
  return { type: `multipart/form-data; boundary=${quoted ? `"${boundary}"` : boundary}`, bytes: Buffer.concat([...parts, Buffer.from(`--${boundary}--\r\n`)]) }
}

t.test('case 15: a form goes to a node of its model, byte for byte; without a model to any', async t => {
  const servers = await Promise.all(['org/a', 'b'].map(async id => await server(t, { id })))
  const url = await gatewayOver(t, ...servers)
  const random = seededRandom(15)
  const send = async ({ type, bytes }: ReturnType<typeof form>): Promise<Response> => await fetch(`${url}/v1/audio/transcriptions`, { method: 'POST', headers: { 'content-type': type }, body: new Uint8Array(bytes) })
  for (let i = 0; i < 40; i++) {
    const model = ['org/a', 'b'][i % 2]!
    const sent = form(random, model)
    t.same(await (await send(sent)).json(), { by: model })
    const { headers, body } = servers[i % 2]!.seen.at(-1)!
    if (headers['content-type'] !== sent.type || !body.equals(sent.bytes)) t.fail(`form ${i} was changed`)
  }
  t.equal((await send(form(random, undefined))).status, 200)
  const unknown = await send(form(random, 'nope'))
  t.equal(unknown.status, 404)
  t.match(await unknown.json(), { error: { code: 'model_not_found', param: 'model' } })
  for (const type of ['multipart/form-data', 'multipart/form-data; boundary=other']) t.equal((await send({ type, bytes: form(random, 'b').bytes })).status, 200, 'a form that can\'t be read is the node\'s to judge')
  const chat = await fetch(`${url}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'multipart/form-data; boundary=x' }, body: '--x--' })
  t.equal(chat.status, 415)
})

/** Forms in which some server finds the model `b`, and another one, or none, finds `org/a`. */
function * doubtful (): Generator<[what: string, type: string, body: string]> {
  const type = 'multipart/form-data; boundary=B'
  const part = (head: string, value: string, delimiter = '--B'): string => `${delimiter}\r\n${head}\r\n\r\n${value}\r\n`
  const field = (name: string): string => `Content-Disposition: form-data; name=${name}`
  const [good, bad, end] = [part(field('"model"'), 'org/a'), part(field('"model"'), 'b'), '--B--\r\n']
  for (const [what, one, two] of [['good first', good, bad], ['bad first', bad, good]] as const) {
    yield [`twice, ${what}`, type, one + two + end]
    yield [`with others between, ${what}`, type, one + part(field('"x"'), '1') + two + end]
    for (const extra of ['; filename="x"', "; filename*=utf-8''x", '; filename=""']) yield [`one a file, ${what}`, type, one + two.replace('"model"', `"model"${extra}`) + end]
  }
  for (const more of ['; boundary=A', '; Boundary=A', '; boundary*=A', '; boundary*0=A', '; charset=utf-7', '; charset=utf-16', '; charset=utf-8; charset=utf-7', '; =', '; "x"']) yield [`content type ${more}`, type + more, good + end]
  for (const name of ['"mod\\el"', '<model>', '"model', 'model"', '"mod"el', '"x"; name="model"', '"x"; name*=utf-8\'\'model', '"x"; name*0="mo"; name*1="del"', '"x"; NAME="model"', '"f"; filename="a\\"; name="model"']) yield [`name=${name}`, type, good + part(field(name), 'b') + end]
  const heads = [`${field('"x"')}\r\n${field('"model"')}`, `${field('"x"')}\r\ncontent-disposition: form-data; name="model"`, 'Content-Disposition: attachment; name="model"', 'X: y', `X: y\r\n ${field('"model"')}`, `X: y\n${field('"model"')}`,
    'Content-Disposition : form-data; name="model"', 'Content-Disposition: form-data;\r\n name="model"', '']
  for (const head of heads) yield [`head ${JSON.stringify(head)}`, type, good + part(head, 'b') + end]
  for (const encoding of ['base64', 'quoted-printable']) yield [encoding, type, part(`${field('"model"')}\r\nContent-Transfer-Encoding: ${encoding}`, 'org/a') + end]
  yield ['a field of the gateway', type, good + part(field('"kv_transfer_params"'), '{}') + end]
  for (const delimiter of ['\n--B', '\r--B', '--B ', '--Bx', '--B\t']) yield [`delimiter ${JSON.stringify(delimiter)}`, type, part(field('"x"'), '1') + (delimiter.startsWith('--') ? '' : 'x') + part(field('"model"'), 'b', delimiter) + good + end]
  yield ['line feeds', type, (bad + end).replaceAll('\r\n', '\n')]
  yield ['a preamble', type, `x\r\n${good}${end}`]
  yield ['no line before the end', type, `--B\r\n${field('"model"')}\r\n\r\n--B--\r\n`]
  yield ['no end', type, good]
  yield ['an end within a part', type, good + bad.slice(0, -6)]
  yield ['too many parts', type, part(field('"x"'), '1').repeat(2_001) + good + end]
}

t.test('a form of which two servers could read two models is refused', async t => {
  const [a, b] = [await server(t, { id: 'org/a' }), await server(t, { id: 'b' })]
  const url = await gatewayOver(t, a, b)
  for (const [what, type, body] of doubtful()) {
    const answer = await fetch(`${url}/v1/audio/transcriptions`, { method: 'POST', headers: { 'content-type': type }, body })
    t.equal(answer.status, 400, what)
    t.match(await answer.json(), { error: { message: /Servers would not agree|not for clients/ } }, what)
  }
  t.same([...a.seen, ...b.seen], [])
})

t.test("models have their node's own cards", async t => {
  const card = { id: 'org/m', object: 'model', created: 5, owned_by: 'vllm', root: '/models/m', max_model_len: 32_768, permission: [{ id: 'p' }] }
  const url = await gatewayOver(t, await server(t, card))
  t.same((await (await fetch(`${url}/v1/models`)).json() as { data: object[] }).data, [card])
  t.same(await (await fetch(`${url}/v1/models/org/m`)).json(), card)
  t.same((await (await fetch(`${url}/v1/models/`)).json() as { data: object[] }).data, [card], 'one slash too many')
})

t.test('a card that is written anew for each answer is no change of the node', async t => {
  let answers = 0
  const http = createServer((_request, response) => { response.setHeader('content-type', 'application/json').end(JSON.stringify({ data: [{ id: 'm', created: ++answers, permission: [{ id: answers }] }] })) }).listen(0, '127.0.0.1')
  t.teardown(() => { http.closeAllConnections(); http.close() })
  await once(http, 'listening')
  const node = `http://127.0.0.1:${(http.address() as AddressInfo).port}`
  const { app } = await buildGateway(t, { options: { nodes: [{ url: node, adapter: 'openai' }] } })
  const { version } = await app.epd.nodes.waitFor(({ models }) => models.length > 0)
  const before = answers
  app.epd.nodes.probe(node)
  await until(() => answers >= before + 2, 'it was probed again')
  t.equal(app.epd.nodes.snapshot().version, version)
})

t.test('fastify-epd serve forgives a slash too many, and has no other shape of errors than OpenAI\'s', async t => {
  const node = await FakeNode.start(t)
  const config = await tempFile(t, 'epd.config.json', JSON.stringify({ embedded: false, nodes: [{ url: node.url, adapter: 'openai' }], cors: ['http://localhost:3000'] }))
  const { url } = await startCli(t, ['serve', '--config', config, '--port', '0', '--log-level', 'error'])
  const question = { model: 'm', messages: [] }
  for (const path of ['//v1/chat/completions', '/v1//chat/completions']) t.equal((await (await post(url + path, question)).json() as { error: { code: string } }).error.code, (await (await post(`${url}/v1/chat/completions`, question)).json() as { error: { code: string } }).error.code, path)
  t.equal((await fetch(`${url}//v1/models/`)).status, 200)
  for (const [method, path] of [['POST', '/chat/completions'], ['GET', '/nothing'], ['PUT', '/v1/models']] as const) {
    const answer = await fetch(url + path, { method })
    t.equal(answer.status, 404)
    t.match(await answer.json(), { error: { message: /base URLs/, type: 'invalid_request_error', code: 'not_found', param: null } })
  }
  for (const method of ['PUT', 'PATCH', 'POST']) {
    for (const [type, body] of [['application/json', undefined], ['application/json', '{'], ['none', undefined], ['application/json', `"${'x'.repeat(2_000_000)}"`]] as const) {
      const answer = await fetch(`${url}${method === 'POST' ? '' : '/v1'}/files`, { method, headers: { 'content-type': type }, ...(body === undefined ? {} : { body }) })
      t.equal(answer.status, 404, `${method} ${type} ${body?.slice(0, 5)}`)
      t.match(await answer.json(), { error: { message: new RegExp(`no route ${method}`), type: 'invalid_request_error', code: 'not_found', param: null } })
    }
  }
  const asked = await fetch(`${url}/v1/chat/completions`, { method: 'OPTIONS', headers: { origin: 'http://localhost:3000', 'access-control-request-method': 'POST', 'access-control-request-headers': 'authorization,content-type' } })
  t.equal(asked.status, 204, 'case 14: a browser that asks first')
  t.match(Object.fromEntries(asked.headers), { 'access-control-allow-origin': 'http://localhost:3000', 'access-control-allow-methods': /POST/, 'access-control-allow-headers': 'authorization,content-type' })
})

t.test('routes beside /v1 reach a node of their model, or any where they name none', async t => {
  const [one, two] = [await server(t, { id: 'one' }), await server(t, { id: 'two' })]
  const url = await gatewayOver(t, one, two)
  for (const path of ['/tokenize', '/detokenize', '/score', '/rerank', '/v2/rerank', '/pooling']) {
    const answer = await post(url + path, { model: 'two', prompt: 'x' })
    t.equal(answer.status, 200, path)
    t.match(await answer.json(), { by: 'two' })
    t.match(two.seen.at(-1), { method: 'POST', url: path })
    t.same(JSON.parse(two.seen.at(-1)!.body.toString()), { model: 'two', prompt: 'x' })
  }
  t.equal((await post(`${url}/tokenize`, { prompt: 'x' })).status, 200)
  t.match(await (await post(`${url}/score`, { model: 'three' })).json(), { error: { code: 'model_not_found' } })
  t.equal((await fetch(`${url}/tokenize`)).status, 404, 'there is nothing to get')
})

t.test('an application keeps its own route of such a name, and a key is asked for', async t => {
  const one = await server(t, { id: 'm' })
  const { url } = await buildGateway(t, { options: { nodes: [{ url: one.url, adapter: 'openai' }], apiKeys: ['k'] }, before: app => app.post('/score', async () => 'mine') })
  t.equal(await (await post(`${url}/score`, {})).text(), 'mine')
  t.equal((await post(`${url}/rerank`, { model: 'm' })).status, 401)
})

t.test('chosen headers of the client go to the nodes', async t => {
  const one = await server(t, { id: 'm' })
  const { app, url } = await buildGateway(t, { options: { nodes: [{ url: one.url, adapter: 'openai' }], forwardHeaders: ['X-Tenant', 'x-absent'] } })
  await app.epd.nodes.waitFor(({ models }) => models.length === 1)
  const headers = { 'x-tenant': 'a', 'x-other': 'b', authorization: 'Bearer c', cookie: 'd=e' }
  for (const path of ['/v1/embeddings', '/v1/chat/completions']) await post(url + path, { model: 'm', messages: [{ role: 'user', content: 'x' }] }, { headers })
  await fetch(`${url}/v1/files`, { headers })
  const seen = one.seen.filter(({ url }) => url.startsWith('/v1/'))
  t.same([...new Set(seen.map(({ url }) => url))], ['/v1/embeddings', '/v1/chat/completions', '/v1/files'])
  for (const { headers } of seen) t.same([headers['x-tenant'], headers['x-other'], headers.authorization, headers.cookie, headers['x-absent']], ['a', undefined, undefined, undefined, undefined])
  for (const name of ['authorization', 'Cookie', 'Content-Length', 'host', 'x-request-id', 'traceparent', 'x-epd-gateway', 'transfer-encoding']) t.throws(() => resolveOptions({ forwardHeaders: [name] }), { message: /forwardHeaders\[0\] must be none that belongs/ }, name)
  t.throws(() => resolveOptions({ forwardHeaders: ['a b'] }), { message: /forwardHeaders\[0\] must be the name of a header/ })
})
