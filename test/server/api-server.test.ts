import { once } from 'node:events'
import { connect } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { Agent, request } from 'undici'
import type { ChatCall } from '../../engines/service/engine-service.ts'
import { EngineError } from '../../engines/service/errors.ts'
import { deferred } from '../../engines/service/waiting.ts'
import { P2PError } from '../../engines/p2p/types.ts'
import { startApiServer, type ApiServer, type ApiServerOptions } from '../../engines/server/index.ts'
import { FakeEngine } from '../helper/fake-engine.ts'
import { metric } from '../helper/metrics.ts'
import { promlint } from '../helper/promlint.ts'
import { until } from '../helper/until.ts'

interface Running { server: ApiServer, engine: FakeEngine, get: (path: string, headers?: Record<string, string>) => Promise<Answer>, post: (path: string, body: unknown, headers?: Record<string, string>) => Promise<Answer> }
interface Answer { status: number, json: any, text: string, headers: Record<string, string | string[] | undefined> }

async function start (t: Test, options: Partial<ApiServerOptions> = {}, role: FakeEngine['role'] = 'hybrid'): Promise<Running> {
  const server = await startApiServer({ version: '0.0.0', createEngine: async url => new FakeEngine(url, role), ...options })
  t.teardown(() => server.close())
  const dispatcher = new Agent()
  t.teardown(() => dispatcher.destroy())
  return { server, engine: server.engine as FakeEngine, ...client(server.url, dispatcher) }
}

function client (url: string, dispatcher: Agent): Pick<Running, 'get' | 'post'> {
  const call = async (path: string, init: object): Promise<Answer> => {
    const response = await request(url + path, { dispatcher, ...init })
    const text = await response.body.text()
    return { status: response.statusCode, text, json: text.startsWith('{') ? JSON.parse(text) : undefined, headers: response.headers }
  }
  return {
    get: (path, headers = {}) => call(path, { headers }),
    post: (path, body, headers = {}) => call(path, {
      method: 'POST', body: typeof body === 'string' ? body : JSON.stringify(body), headers: { 'content-type': 'application/json', ...headers }
    })
  }
}

function endpointInfo (engine: string): object {
  return { v: 1, engine, epoch: 1, host_id: 'h', tcp: 'tcp://127.0.0.1:1', ipc: null, curve: null, fingerprint: 'f', pools: {} }
}

const MESSAGES = { model: 'fake-vlm', messages: [{ role: 'user', content: 'hello' }] }

t.test('the server listens before the engine is ready and says so', async t => {
  let ready!: () => void
  let made!: FakeEngine
  const dispatcher = new Agent()
  t.teardown(() => dispatcher.destroy())
  const starting = startApiServer({
    version: '0.0.0',
    createEngine: async url => {
      made = new FakeEngine(url)
      made.ready = new Promise(resolve => { ready = resolve })
      return made
    }
  })
  await until(() => made, 'the engine is made')
  const { get, post } = client(made.url, dispatcher)
  const health = await get('/health')
  t.equal(health.status, 503)
  t.equal(health.json.status, 'initialising')
  const refused = await post('/v1/chat/completions', MESSAGES)
  t.equal(refused.status, 503)
  t.equal(refused.json.error.code, 'initialising')
  t.equal(refused.headers['retry-after'], '1')
  ready()
  const server = await starting
  t.teardown(() => server.close())
  t.equal(server.url, made.url, 'the engine got the URL that is its id')
  t.strictSame((await get('/health')).json, { status: 'healthy', message: 'The engine takes requests.' })
})

t.test('an engine that never gets ready fails the start and leaves no port open', async t => {
  let url = ''
  await t.rejects(startApiServer({
    version: '0.0.0',
    createEngine: async own => {
      url = own
      throw new Error('no such model')
    }
  }), /no such model/)
  const socket = connect(Number(new URL(url).port), '127.0.0.1')
  const [err] = await once(socket, 'error')
  t.equal(err.code, 'ECONNREFUSED')
})

t.test('a request reaches the engine with its id, tenant, consumer and trace context', async t => {
  const { engine, post } = await start(t)
  const answer = await post('/v1/chat/completions', { ...MESSAGES, epd_tenant: 'acme' }, {
    'x-request-id': 'abc', 'x-epd-consumer': 'http://pd:1', traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
  })
  t.equal(answer.status, 200)
  t.equal(answer.headers['x-request-id'], 'abc')
  const call = engine.calls[0]!
  t.match(call, { requestId: 'abc', tenant: 'acme', consumer: 'http://pd:1' })
  const { trace } = await import('@opentelemetry/api')
  t.match(trace.getSpanContext(call.context), { traceId: '0af7651916cd43dd8448eb211c80319c', spanId: 'b7ad6b7169203331', isRemote: true })
  t.notOk(call.signal.aborted, 'reading the body does not abort the request')
})

t.test('errors have the shape of OpenAI, and an internal fault reveals nothing', async t => {
  const { engine, post, get } = await start(t)
  const error = async (body: unknown, headers?: Record<string, string>): Promise<[number, any]> => {
    const { status, json } = await post('/v1/chat/completions', body, headers)
    return [status, json.error]
  }
  t.match(await error('{"model":'), [400, { type: 'invalid_request_error', code: 'invalid_request' }])
  t.match(await error([1]), [400, { code: 'invalid_request', message: /JSON object/ }])
  t.match(await error({ ...MESSAGES, model: 'other' }), [404, { type: 'invalid_request_error', code: 'model_not_found', param: 'model', message: /fake-vlm/ }])
  t.match(await error({ ...MESSAGES, model: 7 }), [400, { param: 'model' }])
  engine.answer = async () => { throw new EngineError('invalid_media', 'not a picture', { param: 'messages[0].content[1]' }) }
  t.strictSame(await error(MESSAGES), [400, { message: 'not a picture', type: 'invalid_request_error', code: 'invalid_media', param: 'messages[0].content[1]' }])
  engine.answer = async () => { throw new EngineError('busy', 'no room', { retryAfter: 7 }) }
  const busy = await post('/v1/chat/completions', MESSAGES)
  t.equal(busy.status, 503)
  t.equal(busy.headers['retry-after'], '7')
  engine.answer = async () => { throw new Error('secret /etc/path') }
  const internal = await post('/v1/chat/completions', MESSAGES)
  t.equal(internal.status, 500)
  t.notMatch(internal.text, /secret/)
  for (const [path, body] of [['/v1/completions', { prompt: 'x' }], ['/v1/responses', { input: 'x' }]] as const) t.match((await post(path, { model: 'fake-vlm', ...body })).json, { error: { code: 'unsupported' } })
  t.match(await get('/nowhere'), { status: 404, json: { error: { code: 'not_found', message: /GET \/nowhere/ } } })
})

t.test('a body beyond the limit is refused', async t => {
  const { post } = await start(t, { bodyLimit: 1_000 })
  const answer = await post('/v1/chat/completions', { ...MESSAGES, pad: 'x'.repeat(2_000) })
  t.equal(answer.status, 413)
  t.equal(answer.json.error.code, 'request_too_large')
})

t.test('a stream passes through, and what breaks it becomes an error event', async t => {
  const { engine, post } = await start(t)
  engine.answer = async () => ({
    status: 200,
    stream: (async function * () {
      yield Buffer.from('data: 1\n\n')
      throw new EngineError('internal', 'ran out of luck')
    })()
  })
  const answer = await post('/v1/chat/completions', { ...MESSAGES, stream: true })
  t.equal(answer.status, 200)
  t.match(answer.headers['content-type'], /^text\/event-stream/)
  t.equal(answer.text.split('\n\n')[0], 'data: 1')
  t.match(JSON.parse(answer.text.split('\n\n')[1]!.slice(6)), { error: { code: 'internal', message: 'ran out of luck' } })
})

t.test('a client that leaves aborts its request, before the answer and in the middle of a stream', async t => {
  const { server, engine } = await start(t)
  const port = Number(new URL(server.url).port)
  const body = JSON.stringify(MESSAGES)
  const head = `POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`
  let returned = 0
  const scripts: Array<(call: ChatCall) => ReturnType<FakeEngine['answer']>> = [
    async call => {
      await once(call.signal, 'abort')
      throw call.signal.reason
    },
    async call => ({
      status: 200,
      stream: (async function * () {
        try {
          yield Buffer.from('data: 1\n\n')
          await Promise.race([once(call.signal, 'abort'), delay(5_000, undefined, { ref: false })])
        } finally { returned++ }
      })()
    })
  ]
  for (const script of scripts) {
    engine.answer = script
    const socket = connect(port, '127.0.0.1')
    socket.write(head)
    const call = await until(() => engine.calls.at(-1), 'the engine has the request')
    if (script === scripts[1]) await once(socket, 'data')
    t.notOk(call.signal.aborted)
    socket.destroy()
    await until(() => call.signal.aborted, 'the signal aborts', 1_000)
    t.equal(EngineError.is(call.signal.reason) && call.signal.reason.code, 'cancelled')
    engine.calls.length = 0
  }
  await until(() => returned === 1, 'the stream was ended')
})

t.test('POST /abort_request finds requests by id, and all of them', async t => {
  const { engine, post } = await start(t)
  engine.answer = async call => {
    if (!call.signal.aborted) await once(call.signal, 'abort')
    throw call.signal.reason
  }
  const first = post('/v1/chat/completions', MESSAGES, { 'x-request-id': 'same' })
  await until(() => engine.calls.length === 1, 'the first is in flight')
  const second = post('/v1/chat/completions', MESSAGES, { 'x-request-id': 'same' })
  await until(() => engine.calls.length === 2, 'the second is in flight')
  t.equal(engine.calls[1]!.requestId, 'same#2', 'ids are unique among the requests in flight')
  t.match((await post('/abort_request', { request_id: 'other' })).json, { aborted: 0 })
  t.match((await post('/abort_request', { request_id: 'same' })).json, { aborted: 2 })
  t.strictSame(engine.aborted, ['other', 'same', 'same#2'], 'the engine is asked in any case: it may hold leases for a request that was answered')
  t.equal((await first).status, 499)
  t.equal((await second).status, 499)
  const third = post('/v1/chat/completions', MESSAGES)
  await until(() => engine.calls.length === 3, 'the third is in flight')
  t.match((await post('/abort_request', { abort_all: true })).json, { aborted: 1 })
  t.equal((await third).json.error.code, 'cancelled')
  t.equal((await post('/abort_request', {})).status, 400)
})

t.test('a request keeps its id when what was told of it is still being read, and only the request is counted', async t => {
  const { engine, get, post } = await start(t)
  const told = deferred<void>()
  engine.answer = async ({ ahead }) => {
    if (ahead === true) await told.promise
    return { status: 200, json: {} }
  }
  const telling = post('/v1/chat/completions', MESSAGES, { 'x-request-id': 'same', 'x-epd-ahead': '1' })
  await until(() => engine.calls.length === 1, 'it is being read')
  await post('/v1/chat/completions', MESSAGES, { 'x-request-id': 'same' })
  t.same(engine.calls.map(({ requestId, ahead }) => [requestId, ahead]), [['same', true], ['same', false]])
  told.resolve()
  await telling
  t.equal(metric((await get('/metrics')).text, 'gen_ai_server_request_duration_seconds_count'), 1)
})

t.test('an api key is asked for everywhere but at /health', async t => {
  const { get, post } = await start(t, { apiKey: 'sesame' })
  t.equal((await get('/health')).status, 200)
  for (const path of ['/metrics', '/v1/models', '/distserve/engine_info', '/healthy']) t.equal((await get(path)).status, 401, path)
  t.match((await post('/v1/chat/completions', MESSAGES, { authorization: 'Bearer nope' })).json, { error: { type: 'authentication_error', code: 'invalid_api_key' } })
  t.equal((await get('/metrics', { authorization: 'Bearer sesame' })).status, 200)
})

t.test('metrics are good Prometheus text and good OpenMetrics, before and after a request', async t => {
  const { engine, get, post } = await start(t)
  for (const round of ['before', 'after']) {
    for (const accept of ['text/plain', 'application/openmetrics-text; version=1.0.0']) {
      const { text, headers } = await get('/metrics', { accept })
      t.strictSame(promlint(text), [], `${accept} ${round}`)
      t.ok(headers['content-type']?.toString().startsWith(accept))
      t.match(text, /^epd_build_info\{component="engine",role="hybrid",backend="pytorch",version="\d/m)
    }
    await post('/v1/chat/completions', MESSAGES)
    engine.counters.observe('time_per_output_token', 0.02)
    engine.statuses.RUNNING = 1
  }
})

t.test('an exemplar names the trace of a sampled request', async t => {
  const { get, post } = await start(t)
  const of = (flags: string, digit: string): Record<string, string> => ({ traceparent: `00-${digit.repeat(32)}-b7ad6b7169203331-${flags}` })
  await post('/v1/chat/completions', MESSAGES, of('01', 'a'))
  const { text } = await get('/metrics', { accept: 'application/openmetrics-text' })
  t.match(text, new RegExp(`^gen_ai_server_request_duration_seconds_bucket\\{.*\\} 1 # \\{trace_id="${'a'.repeat(32)}"\\}`, 'm'))
  await post('/v1/chat/completions', MESSAGES, of('00', 'c'))
  t.notMatch((await get('/metrics', { accept: 'application/openmetrics-text' })).text, 'cccc')
})

t.test('metrics carry every name of the design, read at the moment of asking', async t => {
  const { engine, get, post } = await start(t)
  await post('/v1/chat/completions', MESSAGES)
  engine.statuses.RUNNING = 2
  engine.counters.encodedItems = 3
  engine.counters.acks = 1
  engine.counters.observe('time_to_first_token', 0.02)
  const { text } = await get('/metrics')
  for (const name of ['epd_feature_blocks_capacity', 'epd_feature_blocks_free', 'epd_feature_blocks_cached', 'epd_kv_blocks_capacity', 'epd_kv_blocks_free',
    'epd_kv_blocks_cached', 'epd_leases_open', 'epd_encoded_items_total', 'epd_encoder_cache_hits_total', 'epd_migrated_bytes_total', 'epd_acks_total']) {
    t.type(metric(text, name), 'number', name)
  }
  t.equal(metric(text, 'epd_feature_blocks_free'), 5)
  t.equal(metric(text, 'epd_sequences', { status: 'RUNNING' }), 2)
  t.equal(metric(text, 'epd_encoded_items_total'), 3)
  t.equal(metric(text, 'gen_ai_server_time_to_first_token_seconds_count'), 1)
  t.equal(metric(text, 'gen_ai_server_time_to_first_token_seconds_bucket', { le: '0.02' }), 1)
  t.equal(metric(text, 'gen_ai_server_request_duration_seconds_count'), 1)
  t.ok(metric(text, 'gen_ai_server_request_duration_seconds_sum')! > 0, 'a request has taken some time')
  delete engine.statuses.RUNNING
  engine.counters.encodedItems = 4
  const later = (await get('/metrics')).text
  t.equal(metric(later, 'epd_sequences', { status: 'RUNNING' }), 0, 'a status without sequences disappears')
  t.equal(metric(later, 'epd_encoded_items_total'), 4)
})

t.test('distserve speaks the shapes of LMDeploy', async t => {
  const { engine, get, post } = await start(t)
  t.strictSame((await get('/distserve/engine_info')).json, engine.info())
  t.match((await get('/v1/models')).json, { object: 'list', data: [{ id: 'fake-vlm', object: 'model', owned_by: 'fastify-epd' }] })
  const init = { local_engine_id: engine.url, local_engine_config: {}, remote_engine_id: 'http://pd:1', remote_engine_config: {}, protocol: 1, rank: null, tcp_config: null }
  t.strictSame((await post('/distserve/p2p_initialize', init)).json, {
    status: 1,
    engine_endpoint_info: { zmq_address: 'tcp://127.0.0.1:9999' },
    kvtransfer_endpoint_info: [{ protocol: 1, endpoint_info: JSON.stringify(engine.p2p.endpoint) }]
  })
  const remote = endpointInfo('http://really-pd:1')
  const connection = { protocol: 1, remote_engine_id: 'http://pd:1', remote_engine_endpoint_info: { zmq_address: 'x' }, remote_kvtransfer_endpoint_info: [{ protocol: 1, endpoint_info: JSON.stringify(remote) }] }
  const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
  t.strictSame((await post('/distserve/p2p_connect', connection, { traceparent })).json, { status: 1 })
  t.strictSame(engine.linked, [remote])
  t.strictSame(engine.linkTraces, [traceparent], 'the link\'s first message belongs to the caller\'s trace')
  t.strictSame((await post('/distserve/p2p_drop_connect', { engine_id: engine.url, remote_engine_id: 'http://pd:1' })).json, { success: true })
  t.strictSame(engine.dropped, ['http://really-pd:1'], 'the peer is dropped by the name it calls itself')
  for (const body of [{ remote_session_id: 17 }, { lease: 'b7c1' }, { remote_engine_id: engine.url, remote_session_id: 18, lease: 'b7c2' }]) {
    t.strictSame((await post('/distserve/free_cache', body)).json, { status: 'SUCCESS' })
  }
  t.strictSame(engine.ended, [17, 'b7c1', 'b7c2'], 'the lease says more than the session, which a restarted engine gives to another')
  t.strictSame((await post('/distserve/clear_cache', {})).json, { status: 'SUCCESS' })
  t.equal(engine.cleared, 1)
})

t.test('the consumer of a request is the linked peer, by whichever name a gateway has for it', async t => {
  const { engine, post } = await start(t)
  const info = [{ protocol: 1, endpoint_info: JSON.stringify(endpointInfo('http://really-pd:1')) }]
  await post('/distserve/p2p_connect', { remote_engine_id: 'http://pd:1/v1', remote_kvtransfer_endpoint_info: info })
  for (const name of ['http://pd:1/v1', 'http://really-pd:1', 'http://other:1']) await post('/v1/chat/completions', MESSAGES, { 'x-epd-consumer': name })
  t.same(engine.calls.map(({ consumer }) => consumer), ['http://really-pd:1', 'http://really-pd:1', 'http://other:1'])
})

t.test('a link is dropped by either name of its peer, also while it is being made', async t => {
  const { engine, post } = await start(t)
  let shaken: (() => void) | undefined
  engine.connecting = async () => { await new Promise<void>(resolve => { shaken = resolve }) }
  const info = [{ protocol: 1, endpoint_info: JSON.stringify(endpointInfo('http://really-pd:1')) }]
  const connecting = post('/distserve/p2p_connect', { remote_engine_id: 'http://pd:1', remote_kvtransfer_endpoint_info: info })
  await until(() => shaken !== undefined, 'the handshake has begun')
  await post('/distserve/p2p_drop_connect', { remote_engine_id: 'http://pd:1' })
  t.strictSame(engine.dropped, ['http://really-pd:1'])
  shaken!()
  await connecting
})

t.test('a pair that can not work together is refused with the reason, a malformed call is a 400', async t => {
  const { engine, post } = await start(t)
  const init = { remote_engine_id: 'http://pd:1' }
  t.match((await post('/distserve/p2p_initialize', { ...init, protocol: 2 })).json, { status: 2, code: 'REFUSED', message: /protocol 2/ })
  t.match((await post('/distserve/p2p_initialize', { ...init, remote_engine_config: { fingerprint: 'x', model: 'other' } })).json, { status: 2, message: /different models/ })
  const info = [{ protocol: 1, endpoint_info: JSON.stringify(endpointInfo('http://pd:1')) }]
  engine.connecting = async () => { throw new P2PError('TIMEOUT', 'no answer') }
  t.strictSame((await post('/distserve/p2p_connect', { ...init, remote_kvtransfer_endpoint_info: info })).json, { status: 2, code: 'TIMEOUT', message: 'no answer' })
  t.match((await post('/distserve/p2p_connect', { ...init, remote_kvtransfer_endpoint_info: [{ endpoint_info: 'nonsense' }] })).json, { status: 2, code: 'REFUSED', message: /not JSON/ })
  t.match((await post('/distserve/p2p_connect', { ...init, remote_kvtransfer_endpoint_info: [{ endpoint_info: '{"v":9}' }] })).json, { status: 2, message: /version 9/ })
  for (const [path, body, param] of [
    ['/distserve/p2p_initialize', {}, 'remote_engine_id'],
    ['/distserve/p2p_connect', init, 'remote_kvtransfer_endpoint_info'],
    ['/distserve/p2p_connect', { ...init, remote_kvtransfer_endpoint_info: [7] }, 'remote_kvtransfer_endpoint_info[0].endpoint_info'],
    ['/distserve/free_cache', { remote_session_id: 'x' }, 'remote_session_id']
  ] as const) {
    t.match(await post(path, body), { status: 400, json: { error: { code: 'invalid_request', param } } })
  }
  engine.connecting = async () => { throw new TypeError('a bug') }
  t.equal((await post('/distserve/p2p_connect', { ...init, remote_kvtransfer_endpoint_info: info })).status, 500)
})

t.test('closing lets requests in flight finish and refuses new ones, while health says draining', async t => {
  const { server, engine, get, post } = await start(t)
  let finish!: () => void
  engine.answer = async () => {
    await new Promise<void>(resolve => { finish = resolve })
    return { status: 200, json: { done: true } }
  }
  engine.values.epd_leases_open = 1
  const running = post('/v1/chat/completions', MESSAGES)
  await until(() => engine.calls.length === 1, 'the request is in flight')
  const closing = server.close(5_000)
  t.match(await get('/health'), { status: 503, json: { status: 'draining' } })
  t.match(await post('/v1/chat/completions', MESSAGES), { status: 503, json: { error: { code: 'draining' } } })
  finish()
  t.strictSame((await running).json, { done: true })
  t.equal((await post('/distserve/free_cache', { remote_session_id: 1 })).status, 200, 'peers can still end their leases')
  engine.values.epd_leases_open = 0
  await closing
  t.equal(engine.closed, 1)
})

t.test('what does not finish within the grace time is aborted', async t => {
  const { server, engine, post } = await start(t)
  engine.answer = async call => {
    await once(call.signal, 'abort')
    throw call.signal.reason
  }
  const running = post('/v1/chat/completions', MESSAGES)
  await until(() => engine.calls.length === 1, 'the request is in flight')
  await server.close(20)
  t.equal((await running).status, 499)
  t.equal(engine.closed, 1)
})

t.test('without a key operators\' routes answer this machine only, and no page of another site', async t => {
  const { get, post, server } = await start(t)
  const refused: Array<Record<string, string>> = [
    { 'x-forwarded-for': '10.0.0.9' },
    { host: 'engine.example', origin: 'http://engine.example' },
    { host: 'engine.example', 'user-agent': 'Mozilla/5.0' },
    { host: 'engine.example', 'sec-fetch-site': 'same-origin' }
  ]
  for (const headers of refused) {
    for (const path of ['/abort_request', '/distserve/free_cache', '/distserve/clear_cache', '/distserve/p2p_connect', '/distserve/p2p_drop_connect', '/distserve/p2p_initialize']) {
      t.match(await post(path, {}, headers), { status: 403, json: { error: { code: 'forbidden' } } }, `${path} ${JSON.stringify(headers)}`)
    }
    t.equal((await get('/distserve/engine_info', headers)).status, 403)
    t.equal((await get('/health', headers)).status, 200)
  }
  t.equal((await post('/distserve/clear_cache', {}, { host: 'engine.example' })).status, 200, 'engines and tools may use any name')
  t.equal((await post('/distserve/clear_cache', {}, { origin: server.url })).status, 200)
  const keyed = await start(t, { apiKey: 'secret' })
  t.equal((await keyed.post('/distserve/clear_cache', {})).status, 401)
  t.equal((await keyed.post('/distserve/clear_cache', {}, { authorization: 'Bearer secret', 'x-forwarded-for': '10.0.0.9' })).status, 200)
})

t.test('the names of gauges are Prometheus\', and the old ones stay for a while', async t => {
  const { get } = await start(t)
  const { text } = await get('/metrics')
  t.strictSame(promlint(text), [])
  t.equal(metric(text, 'epd_kv_blocks_total'), metric(text, 'epd_kv_blocks_capacity'))
})
