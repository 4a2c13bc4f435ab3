/** A good status is no answer: what comes instead of one is the node's failure, before anything has reached the client. */
import { brotliCompressSync, deflateSync, gzipSync } from 'node:zlib'
import t from 'tap'
import { ask, CHUNK, COMPLETION, gatewayFor, modelServer, well, type ModelServer, type Script, type TestGateway } from '../helper/model-server.ts'

const WHOLE = JSON.stringify(COMPLETION)
const EVENTS = 'text/event-stream'
const JSON_TYPE = 'application/json'
/** What Azure says of a prompt before it answers. */
const PREAMBLE = '{"id":"","object":"chat.completion.chunk","model":"","choices":[],"prompt_filter_results":[]}'

/** A server that answers with these bytes, its gateway, and one that has a well server too. */
async function house (t: Parameters<typeof modelServer>[0]): Promise<{ say (type: string | undefined, text: string, chunked?: boolean): void, alone: TestGateway, both: TestGateway, ill: ModelServer }> {
  let script: Script = well
  const ill = await modelServer(t, (...args) => { script(...args) })
  const other = await modelServer(t, well)
  const [alone, both] = await Promise.all([gatewayFor(t, [ill]), gatewayFor(t, [ill, other])])
  return {
    ill,
    alone,
    both,
    say: (type, text, chunked = false) => {
      script = (_request, response) => {
        response.writeHead(200, { ...(type === undefined ? {} : { 'content-type': type }), ...(chunked ? {} : { 'content-length': Buffer.byteLength(text) }) })
        if (chunked && text !== '') response.write(text)
        response.end(chunked ? undefined : text)
      }
    }
  }
}

t.test('an answer that is none moves the request; without another node it is a 503', async t => {
  const { say, alone, both } = await house(t)
  const wrong: Array<[string | undefined, string]> = [
    [JSON_TYPE, ''], [JSON_TYPE, 'null'], [JSON_TYPE, '{}'], [JSON_TYPE, '[]'], [JSON_TYPE, '"Hello"'], [JSON_TYPE, '{"choices":[]}'], [JSON_TYPE, '{"choices":[null]}'], [JSON_TYPE, '{"choices":null}'],
    [JSON_TYPE, '<html>Sign in</html>'], ['text/html', '<html>Sign in</html>'], ['text/html', WHOLE], ['text/plain', WHOLE], [undefined, WHOLE], ['application/octet-stream', '\0\0'],
    ...Array.from({ length: 8 }, (_, i): [string, string] => [JSON_TYPE, WHOLE.slice(0, 1 + Math.floor(i * (WHOLE.length - 2) / 7))]),
    [EVENTS, ''], [EVENTS, 'data: [DONE]\n\n'], [EVENTS, 'data: null\n\n'], [EVENTS, 'data: {}\n\ndata: [DONE]\n\n'], [EVENTS, 'data: []\n\n'], [EVENTS, 'data: {"id":"a"}\n\n'], [EVENTS, 'data: {"choices":null}\n\n'], [EVENTS, `data: ${PREAMBLE}\n\ndata: [DONE]\n\n`], [EVENTS, `data: ${PREAMBLE}\n\n: ping\n\ndata: ${PREAMBLE}\n\n`], [EVENTS, 'data: <html>\n\n'], [EVENTS, CHUNK.slice(0, 40)], [EVENTS, '<html>']
  ]
  for (const [i, [type, text]] of wrong.entries()) {
    for (const stream of [true, false]) {
      const chunked = (i % 2 === 0) === stream
      const what = `${type} ${text.slice(0, 20)}... ${chunked ? 'chunked' : 'with a length'}, ${stream ? 'streamed' : 'whole'}`
      say(type, text, chunked)
      const failed = await alone.post(ask({ stream }))
      t.match([failed.status, failed.body?.error.code], [503, 'upstream_failed'], what)
      const { status, text: seen } = await both.post(ask({ stream }))
      t.ok(status === 200 && seen.includes('Hello') && !seen.includes('error'), what)
    }
  }
})

t.test('a good answer passes byte for byte, however it comes', async t => {
  const { say, alone } = await house(t)
  const long = JSON.stringify({ ...COMPLETION, usage: null, more: 'x'.repeat(2_000_000) })
  for (const text of [WHOLE, ` \n${WHOLE}\n`, JSON.stringify({ ...COMPLETION, error: null }), JSON.stringify({ ...COMPLETION, more: 'x'.repeat(100_000) }), long]) {
    for (const chunked of [false, true]) {
      say(JSON_TYPE, text, chunked)
      const { status, text: seen } = await alone.post(ask())
      t.ok(status === 200 && seen === text, `${text.length} bytes`)
    }
  }
  for (const begun of [CHUNK, `\r\n${CHUNK}`, CHUNK.replaceAll('\n', '\r\n'), CHUNK.replaceAll('\n', '\r') + 'data: [DONE]\r\r', `event: message\n${CHUNK}`, CHUNK.replace('"id":"c"', '"id":"error"')]) {
    const text = begun.includes('[DONE]') ? begun : begun + 'data: [DONE]\n\n'
    say(EVENTS, text)
    t.equal((await alone.post(ask({ stream: true }))).text, text)
  }
  // Neither [DONE] nor a finish_reason: a node has cut it in half and ended in good order.
  say(EVENTS, CHUNK)
  const cut = (await alone.post(ask({ stream: true }))).text
  t.ok(cut.startsWith(CHUNK))
  t.match(cut.slice(CHUNK.length), /^\s*data: \{"error":.*"upstream_broken"/)
  const finished = CHUNK.replace('"finish_reason":null', '"finish_reason":"length"')
  say(EVENTS, finished)
  t.equal((await alone.post(ask({ stream: true }))).text, finished)
  for (const [type, text] of [['audio/mpeg', 'ID3'], ['text/plain', 'ok'], ['application/json', '[]'], [undefined, '']] as const) {
    say(type, text)
    t.match(await alone.post({ model: 'm', input: 'x' }, '/v1/audio/speech'), { status: 200, text }, 'other routes answer as they like')
  }
})

t.test('what comes before the first choice waits for it, and passes with it in its order', async t => {
  const { say, alone, both } = await house(t)
  for (const text of [`data: ${PREAMBLE}\n\n${CHUNK}data: [DONE]\n\n`, `: a\n\ndata: ${PREAMBLE}\n\n: b\n\ndata: ${PREAMBLE}\n\n${CHUNK}data: [DONE]\n\n`]) {
    say(EVENTS, text)
    t.equal((await alone.post(ask({ stream: true }))).text, text)
    t.equal((await both.post(ask({ stream: true }))).text.split('Hello').length, 2)
  }
  say(EVENTS, `data: ${PREAMBLE}\n\ndata: {"error":{"message":"why","code":400}}\n\n`)
  t.match(await alone.post(ask({ stream: true })), { status: 400, body: { error: { message: 'why' } } })
})

t.test('of two content-types the first counts', async t => {
  let types: string[] = []
  let text = WHOLE
  const node = await modelServer(t, (_request, response) => { response.writeHead(200, types.flatMap(type => ['content-type', type])).end(text) })
  const { post } = await gatewayFor(t, [node])
  types = [JSON_TYPE, 'text/plain']
  for (const path of ['/v1/chat/completions', '/v1/load_lora_adapter']) {
    const { status, headers, text: seen } = await post(ask(), path)
    t.same([status, headers.get('content-type'), seen], [200, JSON_TYPE, WHOLE], path)
  }
  types = [EVENTS, JSON_TYPE]
  text = `${CHUNK}data: [DONE]\n\n`
  const { headers, text: seen } = await post(ask({ stream: true }))
  t.same([headers.get('content-type'), seen], [EVENTS, text])
})

t.test('a compressed answer that is none moves the request as a plain one does', async t => {
  let coded: Buffer = Buffer.alloc(0)
  let encoding = ''
  const ill = await modelServer(t, (_request, response) => { response.writeHead(200, { 'content-type': JSON_TYPE, 'content-encoding': encoding }).end(coded) })
  const alone = await gatewayFor(t, [ill])
  const good = Buffer.from(WHOLE)
  for (const [name, encode] of [['gzip', gzipSync], ['deflate', deflateSync], ['br', brotliCompressSync]] as const) {
    encoding = name
    coded = encode(good)
    t.equal((await alone.post(ask())).text, WHOLE, name)
    for (const wrong of [encode(good).subarray(0, 40), encode('null'), encode('<html>'), encode(''), encode(good.subarray(0, 40)), good, Buffer.alloc(0)]) {
      coded = wrong
      const failed = await alone.post(ask())
      t.match([failed.status, failed.body?.error.code], [503, 'upstream_failed'], `${name}, ${wrong.length} bytes`)
    }
    coded = encode('{"error":{"message":"why","code":429}}')
    t.match(await alone.post(ask()), { status: 429, body: { error: { message: 'why' } } })
  }
})

t.test('a byte order mark in front of a stream doubles no answer', async t => {
  const { say, alone, both } = await house(t)
  const text = `${CHUNK}data: [DONE]\n\n`
  for (const before of ['', ': ping\n\n', '\n']) {
    say(EVENTS, `\ufeff${before}${text}`)
    for (const gateway of [alone, both]) t.equal((await gateway.post(ask({ stream: true }))).text.split('Hello').length, 2, JSON.stringify(before))
  }
  say(EVENTS, '\ufeffdata: {"error":{"message":"why","code":400}}\n\n')
  t.match(await alone.post(ask({ stream: true })), { status: 400, body: { error: { message: 'why' } } })
})

t.test('a status that is none is no answer, on any route', async t => {
  let status = 600
  const ill = await modelServer(t, (_request, response) => { response.socket!.end(`HTTP/1.1 ${status} ?\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}`) })
  const alone = await gatewayFor(t, [ill])
  for (status of [600, 799, 999]) {
    t.match(await alone.post(ask()), { status: 503, body: { error: { code: 'upstream_failed' } } })
    t.match(await alone.post({}, '/v1/load_lora_adapter'), { status: 503, body: { error: { code: 'upstream_failed' } } })
  }
})

t.test('an error that comes with a good status gets the status that it stands for, however it is spelt', async t => {
  const { say, alone } = await house(t)
  const errors: Array<[unknown, number]> = [
    [{ error: { message: 'why', type: 'BadRequestError', code: 400 } }, 400],
    [{ error: { message: 'why', code: '429' } }, 429],
    [{ error: { message: 'why', type: 'rate_limit_exceeded' } }, 429],
    [{ error: { message: 'why', type: 'insufficient_quota', code: 'insufficient_quota' } }, 429],
    [{ type: 'error', error: { type: 'overloaded_error', message: 'why' } }, 503],
    [{ type: 'error', error: { type: 'invalid_request_error', message: 'why' } }, 400],
    [{ object: 'error', message: 'why', type: 'NotFoundError', code: 404 }, 404],
    [{ message: 'why', type: 'InternalServerError', code: 500 }, 500],
    [{ error: { message: 'why' }, status_code: 422 }, 422],
    [{ error: 'why' }, 500],
    [{ detail: 'why' }, 500],
    [{ status: 'error', message: 'why', code: 504 }, 504],
    [{ id: 'x'.repeat(100), object: 'chat.completion.chunk', error: { message: 'why', code: 400 } }, 400],
    [{ type: 'response.failed', response: { status: 'failed', error: { code: 'server_error', message: 'why' } } }, 500]
  ]
  for (const [value, status] of errors) {
    const text = JSON.stringify(value)
    for (const [type, body] of [[JSON_TYPE, text], [EVENTS, `data: ${text}\n\ndata: [DONE]\n\n`], [EVENTS, `event: error\ndata: ${text}\n\n`], [EVENTS, `data:${text}\r\n\r\n`], [EVENTS, `error: ${text}\n\n`]] as const) {
      say(type, body)
      const seen = await alone.post(ask({ stream: type === EVENTS }))
      t.match({ status: seen.status, body: seen.body }, { status, body: { error: { message: 'why' } } }, body.slice(0, 60))
    }
  }
  say(EVENTS, 'event: error\ndata: out of memory\n\n')
  t.match(await alone.post(ask({ stream: true })), { status: 500, body: { error: { message: 'out of memory' } } })
})
