/** `runLoad` and `fastify-epd bench` against scripted servers and a gateway. */
import t, { type Test } from 'tap'
import { benchOptions } from '../../../plugin/cli/bench/command.ts'
import { runLoad } from '../../../plugin/cli/bench/load.ts'
import { UsageError } from '../../../plugin/cli/usage.ts'
import { runCli, runCommand, spawnCli } from '../../helper/cli.ts'
import { gatewayFor, json, modelServer, type Script } from '../../helper/model-server.ts'
import { until } from '../../helper/until.ts'

const SMALL = { width: 16, height: 8, promptTokens: 5, maxTokens: 4 }

function event (delta: object | null, more: object = {}): string {
  return `data: ${JSON.stringify({ id: 'c', object: 'chat.completion.chunk', model: 'm', choices: delta === null ? [] : [{ index: 0, delta, finish_reason: null }], ...more })}\n\n`
}

/** The role alone, three chunks and, where it is asked for, a usage of four tokens. */
const speaks: Script = (_request, response, body) => {
  response.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8' })
  response.write(event({ role: 'assistant', content: '' }) + event({ content: 'one' }) + event({ content: ' two' }))
  response.end(event({ content: ' three' }) + ('stream_options' in body ? event(null, { usage: { prompt_tokens: 9, completion_tokens: 4 } }) : '') + 'data: [DONE]\n\n')
}

/** A server that keeps what it was sent. */
async function recorder (t: Test, script: Script = speaks): Promise<{ url: string, bodies: Array<Record<string, any>>, headers: Array<Record<string, unknown>> }> {
  const bodies: Array<Record<string, any>> = []
  const headers: Array<Record<string, unknown>> = []
  const { url } = await modelServer(t, (request, response, body, server) => {
    bodies.push(body)
    headers.push(request.headers)
    script(request, response, body, server)
  })
  return { url, bodies, headers }
}

function picturesOf ({ messages: [{ content }] }: Record<string, any>): string[] {
  return Array.isArray(content) ? content.flatMap(part => part.type === 'image_url' ? [part.image_url.url as string] : []) : []
}

t.test('a closed loop sends all requests, counts tokens by usage, and gives times', async t => {
  const { url, bodies } = await recorder(t)
  let most = 0
  const report = await runLoad({ ...SMALL, url: `${url}/v1/`, requests: 12, concurrency: 3, ignoreEos: true, body: { temperature: 0 }, sloTtftMs: 60_000, sloTpotMs: 60_000, onProgress: ({ inFlight }) => { most = Math.max(most, inFlight) } })
  t.match(report, { requests: 12, failed: 0, cancelled: 0, interrupted: false, inputTokens: 108, outputTokens: 48, counted: 'usage', withinSlo: 12, byKind: null, errors: [] })
  t.equal(report.goodput, report.requestsPerSecond)
  for (const spread of [report.ttftMs, report.tpotMs, report.endToEndMs]) t.ok(spread !== null && spread.p50 >= 0 && spread.p50 <= spread.p90 && spread.p90 <= spread.p99 && spread.p99 <= spread.max)
  t.ok(report.results.every(({ ttftMs, endToEndMs }) => ttftMs! <= endToEndMs))
  t.ok(most <= 3)
  t.equal(bodies.length, 12)
  t.match(bodies[0], { model: 'm', stream: true, stream_options: { include_usage: true }, max_tokens: 4, ignore_eos: true, temperature: 0 })
  const sent = bodies.flatMap(picturesOf)
  t.equal(new Set(sent).size, 12, 'each has a picture of its own')
  t.equal(new Set(bodies.map(({ messages }) => messages[0].content.at(-1).text)).size, 12, 'and a text of its own')
})

t.test('without usage chunks are counted', async t => {
  const { url, bodies } = await recorder(t)
  const report = await runLoad({ ...SMALL, url, requests: 2, pictures: 0, usage: false })
  t.match(report, { requests: 2, outputTokens: 6, counted: 'chunks' })
  t.notOk('stream_options' in bodies[0]!)
})

t.test('the same seed sends the same, another seed something else', async t => {
  const one = async (seed: number): Promise<string[]> => {
    const { url, bodies } = await recorder(t)
    await runLoad({ ...SMALL, url, requests: 10, concurrency: 1, pictures: 2, textShare: 0.3, repeat: 0.5, seed })
    return bodies.map(body => JSON.stringify(body))
  }
  const first = await one(7)
  t.same(await one(7), first)
  t.notSame(await one(8), first)
})

t.test('shares of text and of repeated pictures are kept, and each kind has its figures', async t => {
  const { url, bodies } = await recorder(t)
  const report = await runLoad({ ...SMALL, url, requests: 60, textShare: 0.5, repeat: 0.5, warmup: 3 })
  t.equal(bodies.length, 63, 'warm-up requests are sent')
  const text = bodies.slice(3).filter(body => picturesOf(body).length === 0).length
  t.ok(text > 15 && text < 45, `${text} of 60 are text`)
  t.equal(report.byKind?.text.requests, text)
  t.equal(report.byKind?.pictures.requests, 60 - text)
  const pictures = bodies.slice(3).flatMap(picturesOf)
  t.equal(new Set(pictures).size, pictures.length - report.results.reduce((n, { repeated }) => n + repeated, 0), 'as many are repeated as the report says')
  t.ok(new Set(pictures).size < pictures.length)
  const warm = bodies.slice(0, 3).flatMap(picturesOf)
  t.notOk(warm.some(picture => pictures.includes(picture)), 'no picture of the warm-up comes again')
})

t.test('an open loop keeps its schedule though nothing is answered, and counts times from it', async t => {
  const open: Array<() => void> = []
  const { url } = await recorder(t, (request, response, body, server) => { open.push(() => { speaks(request, response, body, server) }) })
  const loading = runLoad({ ...SMALL, url, requests: 20, rate: 500, pictures: 0 })
  await until(() => open.length === 20, 'all are sent')
  for (const answer of open) answer()
  const report = await loading
  t.match(report, { requests: 20, failed: 0, load: { rate: 500, concurrency: null } })
  t.ok(report.results.every(({ lateMs, ttftMs }) => ttftMs! >= lateMs), 'a time has the lateness in it')
  const times = report.results.map(({ atMs }) => atMs).sort((a, b) => a - b)
  t.same(times, [...new Set(times)], 'each is due at a time of its own')
})

t.test('an open loop with a limit never has more in flight', async t => {
  let inFlight = 0
  let most = 0
  const { url } = await recorder(t, (request, response, body, server) => {
    most = Math.max(most, ++inFlight)
    response.on('close', () => { inFlight-- })
    setImmediate(() => { speaks(request, response, body, server) })
  })
  const report = await runLoad({ ...SMALL, url, requests: 30, rate: 100_000, concurrency: 2, pictures: 0 })
  t.equal(report.requests, 30)
  t.ok(most <= 2, `${most} at once`)
})

t.test('failures are counted by status and code with their first message', async t => {
  let turn = 0
  const faults: Script[] = [
    (_request, response) => { json(response, 429, { error: { message: 'first', type: 'x', code: 'overloaded' } }) },
    (_request, response) => { json(response, 429, { error: { message: 'second', type: 'x', code: 'overloaded' } }) },
    (_request, response) => { json(response, 400, { detail: 'no pictures' }) },
    (_request, response) => { json(response, 422, { object: 'error', message: 'flat', type: 'invalid', code: 422 }) },
    (_request, response) => { response.writeHead(502).end('<html>Bad\u0000 gateway' + ' '.repeat(1_000_000)) },
    (_request, response) => { json(response, 200, { choices: [] }) },
    (_request, response) => { response.writeHead(200, { 'content-type': 'text/event-stream' }).end(event({ content: 'cut' })) },
    (_request, response) => { response.writeHead(200, { 'content-type': 'text/event-stream' }).end(`${event({ content: 'a' })}event: error\ndata: {"error":{"message":"node died","code":"upstream_failed"}}\n\n`) },
    (_request, response) => { response.writeHead(200, { 'content-type': 'text/event-stream' }).end('data: {nonsense\n\ndata: [DONE]\n\n') },
    (_request, response) => { response.writeHead(200, { 'content-type': 'text/event-stream' }).end('data: null\n\ndata: [1]\n\ndata: {"choices":[null,{"delta":7}],"usage":{"completion_tokens":"x"}}\n\ndata: [DONE]') },
    (_request, response) => { response.writeHead(200, { 'content-type': 'text/event-stream' }).end('data: ' + 'x'.repeat(5_000_000)) },
    (_request, response) => { response.writeHead(302, { location: 'http://127.0.0.1:1' }).end() },
    (_request, response) => { response.socket?.resetAndDestroy() }
  ]
  const { url } = await recorder(t, (request, response, body, server) => { faults[turn++]!(request, response, body, server) })
  const report = await runLoad({ ...SMALL, url, model: 'm', requests: faults.length, concurrency: 1, pictures: 0 })
  t.match(report.errors[0], { status: 429, code: 'overloaded', message: 'first', count: 2 })
  const found = report.errors.map(({ status, code }) => `${status} ${code}`)
  for (const one of ['400 error', '422 422', '502 error', '200 no_stream', '200 incomplete', '200 upstream_failed', '200 no_json', '200 event_too_long', '302 error']) t.ok(found.includes(one), `${one} in ${found.join(', ')}`)
  t.ok(report.errors.some(({ status, code }) => status === null && /ECONNRESET|UND_ERR_SOCKET/.test(code)))
  t.equal(report.failed + report.requests, faults.length)
})

t.test('names and numbers that are none stay out of the report', async t => {
  const { url } = await modelServer(t, (_request, response, { max_tokens: tokens }) => {
    if (tokens === 1) return json(response, 418, { error: { message: 'no', code: 'c'.repeat(9_999) } })
    response.writeHead(200, { 'content-type': 'text/event-stream', 'x-epd-plan': 'p'.repeat(999) })
    response.end(event({ content: 'one' }) + event(null, { usage: { prompt_tokens: 1e308, completion_tokens: 1.5 } }) + 'data: [DONE]\n\n')
  })
  const report = await runLoad({ ...SMALL, url, requests: 2, pictures: 0 })
  t.match(report, { requests: 2, inputTokens: 0, outputTokens: 2, counted: 'chunks' })
  t.strictSame(Object.keys(report.plans), ['p'.repeat(60)])
  t.match(await runLoad({ ...SMALL, maxTokens: 1, url, requests: 2, pictures: 0 }), { errors: [{ status: 418, code: 'c'.repeat(60), count: 2 }] })
})

t.test('a load that is given up while the models are asked for ends at once', async t => {
  const { url } = await modelServer(t, () => {})
  await t.rejects(runLoad({ ...SMALL, url, requests: 1, signal: AbortSignal.abort() }), { message: 'given up before the first request' })
})

t.test('a server that never ends costs its time limit', async t => {
  const { url } = await recorder(t, (_request, response) => { response.writeHead(200, { 'content-type': 'text/event-stream' }).write(event({ content: 'a' })) })
  t.match(await runLoad({ ...SMALL, url, requests: 1, timeoutMs: 100, pictures: 0 }), { requests: 0, failed: 1, errors: [{ status: 200, code: 'timeout' }] })
})

t.test('answers cut into bytes are read as whole ones', async t => {
  const { url } = await recorder(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    const bytes = Buffer.from(event({ role: 'assistant' }) + event({ content: 'für' }) + event({ reasoning_content: '日本' }).replaceAll('\n', '\r\n') + ': comment\n\n' + event({}, { choices: [{ delta: {}, finish_reason: 'stop' }] }))
    const next = (i: number): void => {
      if (i === bytes.length) response.end()
      else response.write(bytes.subarray(i, i + 1), () => { next(i + 1) })
    }
    next(0)
  })
  t.match(await runLoad({ ...SMALL, url, requests: 1, pictures: 0 }), { requests: 1, outputTokens: 2 })
})

t.test('a gateway gets pictures that it takes, and its plans are counted', async t => {
  const node = await recorder(t)
  const gateway = await gatewayFor(t, [{ url: node.url, asked: 0, up: true, kill () {} }])
  const report = await runLoad({ ...SMALL, url: gateway.url, requests: 4, textShare: 0.5 })
  t.match(report, { requests: 4, failed: 0 })
  t.equal(Object.values(report.plans).reduce((a, b) => a + b, 0), 4)
})

t.test('the command prints a table, or with --json the whole result, and its key reaches the server alone', async t => {
  const { url, headers } = await recorder(t)
  const flags = ['bench', url, '--requests', '3', '--size', '16x8', '--max-tokens', '4', '--slo-ttft', '1m', '--key', 'secret-key', '--header', 'X-Test: 1']
  const [human, machine] = await Promise.all([runCli(flags), runCommand([...flags, '--json'])])
  t.match(human, { code: 0, stderr: '' })
  for (const shown of [/requests +3 ok, 0 failed in /, /throughput +[\d.]+ requests\/s, [\d.]+ output tokens\/s/, /tokens +27 in, 12 out/, /goodput .*TTFT within 60.0 s \(3 of 3\)/, /TTFT +[\d.]+ m?s/, /TPOT/, /end to end/]) t.match(human.stdout, shown)
  // eslint-disable-next-line no-control-regex
  t.notMatch(human.stdout, /\x1b|secret/)
  t.match(JSON.parse(machine.stdout), { requests: 3, load: { width: 16, height: 8 }, results: [{}, {}, {}] })
  t.notMatch(machine.stdout, /secret/)
  t.match(headers[0], { authorization: 'Bearer secret-key', 'x-test': '1' })
})

t.test('what a server says of a failure can not steer the terminal', async t => {
  const { url } = await recorder(t, (_request, response) => { json(response, 500, { error: { message: '\x1b[2Jgone\u009b', code: 'x\x07' } }) })
  const { code, stdout } = await runCommand(['bench', url, '--requests', '2', '--pictures', '0'])
  t.equal(code, 1, 'nothing was answered well')
  t.match(stdout, /500 +x +2 +\[2Jgone/)
  // eslint-disable-next-line no-control-regex
  t.notMatch(stdout, /[\x00-\x09\x0b-\x1f\x7f-\x9f]/)
})

t.test('Ctrl-C prints what there is', async t => {
  let asked = 0
  const { url } = await recorder(t, (request, response, body, server) => { if (++asked <= 5) speaks(request, response, body, server) })
  const bench = spawnCli(t, ['bench', url, '--duration', '10m', '--concurrency', '2', '--pictures', '0', '--json'])
  await until(() => asked === 7, 'two wait', 30_000)
  t.equal(await bench.stop('SIGINT'), 0)
  t.match(JSON.parse(bench.stdout()), { requests: 5, cancelled: 2, interrupted: true })
})

t.test('mistakes in the flags are named', async t => {
  const url = 'http://127.0.0.1:1'
  const cases: ReadonlyArray<readonly [args: string[], message: RegExp]> = [
    [[], /give the URL of a server/],
    [['localhost:8000'], /URL must be an http or https URL/],
    [[url, url], /give one URL/],
    [[url, '--requests', '0'], /--requests must be a whole number from 1/],
    [[url, '--size', '0x5'], /--size must be WxH/],
    [[url, '--size', '9000'], /--size must be WxH/],
    [[url, '--rate', '-1'], /--rate/],
    [[url, '--pictures', '64', '--size', '8192'], /more than 128 megapixels/],
    [['http://user:secret@127.0.0.1:1'], /URL must not hold a password/],
    [[url, '--rate', '0'], /--rate must be/],
    [[url, '--repeat', '1.5'], /--repeat must be a share/],
    [[url, '--duration', '10'], /--duration must be a time such as/],
    [[url, '--timeout', '1000h'], /--timeout must be a time/],
    [[url, '--format', 'gif'], /--format must be one of png, jpeg/],
    [[url, '--body', '[]'], /--body must be a JSON object/],
    [[url, '--body', '{"stream":false}'], /must not turn streaming off/],
    [[url, '--header', 'a b: c'], /--header has characters/],
    [[url, '--key', 'a\nb'], /--key has characters/]
  ]
  for (const [args, message] of cases) t.throws(() => benchOptions(args), { constructor: UsageError, message }, args.join(' '))
  t.match(benchOptions([url, '--size', '640x480', '--duration', '1.5m', '--slo-tpot', '50ms', '--rate', '2.5']), { json: false, options: { width: 640, height: 480, durationMs: 90_000, sloTpotMs: 50, rate: 2.5 } })
})

t.test('a server that can not be asked is one line', async t => {
  const { url } = await modelServer(t, () => {})
  const [down, foreign] = await Promise.all([runCommand(['bench', 'http://127.0.0.1:1']), runCommand(['bench', `${url}/other`])])
  t.match(down, { code: 1, stdout: '', stderr: /^fastify-epd: can't reach http:\/\/127\.0\.0\.1:1 \(ECONNREFUSED\)\n$/ })
  t.match(foreign, { code: 1, stdout: '', stderr: /^fastify-epd: .*answered 404.*\n$/ })
})
