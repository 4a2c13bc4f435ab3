/** The embedded default as a newcomer meets it: demo, serve, an engine that dies, the end. */
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { serveCommand } from '../../plugin/cli/serve.ts'
import { runCli, runCommand, startCli } from '../helper/cli.ts'
import { listenerPid } from '../helper/listener.ts'
import { drawPicture, drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'

interface NodeStatus { readonly role: number, readonly health: string, readonly links?: Record<string, { state: string }> }

const FULL = process.env.EPD_TEST_FULL === '1'
const ENCODER = 4
const HYBRID = 1

await t.test('the demo answers a question about its picture, shows the stages and exits 0, also with keys and a prefix', async t => {
  const config = t.testdir({ 'epd.config.json': '{ "prefix": "/llm", "apiKeys": ["k"], "adminKey": "a" }' })
  const demo = await runCli(['demo', '--config', `${config}/epd.config.json`])
  t.equal(demo.code, 0, demo.stderr)
  t.match(demo.stdout, /Answer {5}2\n/, 'two red circles are in the sample picture')
  t.match(demo.stdout, /Plan {7}e-pd/)
  for (const stage of ['epd.encode', 'engine.encode', 'engine.migrate', 'engine.prefill', 'engine.decode']) {
    t.match(demo.stdout, new RegExp(`${stage.replace('.', '\\.')} .* ms`), stage)
  }
})

if (FULL) {
  await t.test('the demo takes another picture and question', async t => {
    const demo = await runCli(['demo', '--image', 'docs/examples/shapes-2.jpg', '--question', 'Describe the picture.'])
    t.equal(demo.code, 0, demo.stderr)
    t.match(demo.stdout, /Answer {5}\d \w+ \w+/)
    t.match(demo.stdout, /engine\.encode .* ms/)
  })
}

await t.test('serve', async t => {
  const gateway = await startCli(t, ['serve', '--port', '0', '--log-level', 'warn'], { EPD_TEST: '1' })

  const status = async (): Promise<Record<string, NodeStatus>> => await (await fetch(`${gateway.url}/nodes/status`)).json() as Record<string, NodeStatus>
  const ask = async (url: string, signal?: AbortSignal): Promise<Response> => await fetch(`${gateway.url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'tiny-internvl', temperature: 0, messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url } }, { type: 'text', text: 'How many shapes are there?' }] }] }),
    ...(signal === undefined ? {} : { signal })
  })
  const pidOf = async (role: number): Promise<number> => {
    const url = Object.entries(await status()).find(([, node]) => node.role === role && node.health === 'healthy')![0]
    return await listenerPid(Number(new URL(url).port))
  }

  await t.test('reports the progress of the start, and where its page is', async t => {
    t.match(gateway.stderr(), /starting the embedded engines\n/)
    t.notMatch(gateway.stderr(), /loading models/, 'progress is for terminals')
    t.match(gateway.stderr(), /embedded engines are up after [\d.]+ s\n/)
    const page = /live: (http:\S+\/epd\/)\n/.exec(gateway.stderr())![1]!
    t.equal((await fetch(page)).status, 200)
  })

  await t.test('is ready when it prints its URL', async t => {
    const { scene, url } = await drawPicture(1)
    const answer = await ask(url)
    t.equal(answer.status, 200)
    t.equal(answer.headers.get('x-epd-plan'), 'e-pd')
    t.equal((await answer.json() as { choices: Array<{ message: { content: string } }> }).choices[0]!.message.content, String(scene.things.length))
  })

  for (const [name, role] of [['encoder', ENCODER], ['language model engine', HYBRID]] as const) {
    await t.test(`the ${name} is killed during requests: each gets an answer or a clear error, and the next ones work`, async t => {
      const pid = await pidOf(role)
      const asked = Array.from({ length: 4 }, async (_, i) => await ask(await drawScene(100 * role + i)))
      await until(async () => Object.values(await status()).some(node => (node as NodeStatus & { unfinished: number }).unfinished > 0), 'a request is in flight')
      process.kill(pid, 'SIGKILL')
      for (const response of await Promise.all(asked)) {
        // 429: on a busy machine encoders are too slow for all pictures at once.
        t.ok([200, 429, 502, 503].includes(response.status), `answered ${response.status}`)
        if (response.status === 503) {
          t.ok(response.headers.get('retry-after'), 'a 503 says when to try again')
          t.ok((await response.json() as { error: { code: string } }).error.code)
        } else await response.body?.cancel()
      }
      await until(async () => await pidOf(role).catch(() => pid) !== pid, 'the engine was started again', 60_000, 30)
      const picture = await drawScene(100 * role + 50)
      await until(async () => {
        const answer = await ask(picture)
        await answer.body?.cancel()
        return answer.status === 200 && answer.headers.get('x-epd-plan') === 'e-pd'
      }, 'and takes part')
    })
  }

  await t.test('a request that was served leaves a trace with the engines\' spans in it', async t => {
    const answer = await ask(await drawScene(9))
    await answer.body?.cancel()
    const id = answer.headers.get('x-epd-trace-id')!
    await until(async () => {
      const trace = await (await fetch(`${gateway.url}/epd/traces/${id}`)).json() as { spans?: Array<{ name: string }> }
      const names = new Set(trace.spans?.map(span => span.name))
      return ['chat tiny-internvl', 'epd.plan', 'epd.encode', 'epd.decode', 'engine.preprocess', 'engine.encode', 'engine.migrate', 'engine.prefill', 'engine.decode'].every(name => names.has(name))
    }, 'all spans are there')
  })

  await t.test('SIGTERM ends gateway and engines', async t => {
    const pids = await Promise.all([pidOf(ENCODER), pidOf(HYBRID)])
    t.equal(await gateway.stop('SIGTERM'), 0)
    for (const pid of pids) t.throws(() => process.kill(pid, 0), { code: 'ESRCH' }, 'the engine is gone')
  })
})

await t.test('what an engine warns of is in the gateway\'s log, and it ends when that is killed', async t => {
  const receiver = createServer((_request, response) => { response.writeHead(400).end() }).listen(0, '127.0.0.1')
  t.teardown(() => { receiver.close().closeAllConnections() })
  await once(receiver, 'listening')
  const env = { OTEL_EXPORTER_OTLP_ENDPOINT: `http://127.0.0.1:${(receiver.address() as AddressInfo).port}`, OTEL_BSP_SCHEDULE_DELAY: '10' }
  const config = t.testdir({ 'epd.config.json': '{ "embedded": { "encoders": 0, "engines": 1 }, "telemetry": { "traces": false } }' })
  const gateway = await startCli(t, ['serve', '--port', '0', '--log-level', 'warn', '--config', `${config}/epd.config.json`], env)
  const asked = await fetch(`${gateway.url}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ model: 'tiny-internvl', messages: [{ role: 'user', content: 'Hello' }] }) })
  t.equal(asked.status, 200)
  const lines = (): Array<Record<string, unknown>> => gateway.stderr().split('\n').filter(line => line.startsWith('{') && line.endsWith('}')).map(line => JSON.parse(line) as Record<string, unknown>)
  const warning = await until(() => lines().find(line => line.engine === 'engine 1'), 'the engine has lost spans, and said so')
  t.match(warning, { level: 40, msg: /^spans could not be sent to the OTLP receiver: / })
  const own = await until(() => lines().find(line => line.engine === undefined && String(line.msg).startsWith('spans')), 'so has the gateway, which sends them also where it keeps none')
  t.match(own, { level: 40, msg: warning.msg })
  t.ok(lines().every(line => Number(line.level) >= 40), 'information is at level debug only')
  const nodes = await (await fetch(`${gateway.url}/nodes/status`)).json() as Record<string, NodeStatus>
  const pids = await Promise.all(Object.keys(nodes).map(url => listenerPid(Number(new URL(url).port))))
  t.equal(pids.length, 1)
  await gateway.stop('SIGKILL')
  await until(() => pids.every(pid => gone(pid)), 'its engine is gone')
})

await t.test('mistakes are reported in one line each, with exit code 2', async t => {
  const dir = t.testdir({
    'broken.json': '{\n  "nodes": [,]\n}',
    'adapter.json': '\uFEFF{\n  "nodes": [\n    { "url": "http://h:1",\n      "adapter": "vlmm" }\n  ]\n}',
    'twice.json': '{\n  "bypass": "auto",\n  "nodes": [], "bypass": "never"\n}',
    'wrong.json': '{\n  "bypass": "auto",\n  "timeouts": { "encode": -5 },\n  "nodez": []\n}'
  })
  const broken = await serve(t, '--config', `${dir}/broken.json`)
  t.equal(broken.code, 2)
  t.match(broken.stderr, /broken\.json:2:\d+: not valid JSON/)

  // A process of its own for one of them: the code is the process's.
  const wrong = await runCli(['serve', '--config', `${dir}/wrong.json`])
  t.equal(wrong.code, 2)
  t.match(wrong.stderr, /wrong\.json:3:\d+: timeouts\.encode must/)
  t.match(wrong.stderr, /wrong\.json:4:\d+: unknown option nodez/)

  t.match(await serve(t, '--config', `${dir}/adapter.json`), { code: 2, stderr: /adapter\.json:4:18: nodes\[0\]\.adapter must be one of/ })
  t.match(await serve(t, '--config', `${dir}/twice.json`), { code: 2, stderr: /twice\.json:3:16: "bypass" is given twice/ })
  t.match(await serve(t, '--config', `${dir}/missing.json`), { code: 2, stderr: /can't read/ })
  t.match(await serve(t, '--port', 'x'), { code: 2, stderr: /--port/ })
  t.match(await runCommand(['frobnicate']), { code: 2, stderr: /unknown command 'frobnicate'/ })
  for (const command of ['serve', 'engine', 'demo', 'trace']) t.match(await runCommand([command, '--help']), { code: 0, stdout: new RegExp(`fastify-epd ${command}`) })
})

/** `fastify-epd serve` with flags it refuses, in this process. */
async function serve (t: Test, ...flags: string[]): Promise<{ code: number, stderr: string }> {
  const written = t.capture(process.stderr, 'write', () => true)
  const code = await serveCommand(flags)
  const stderr = written().map(({ args }) => String(args[0])).join('')
  written.restore()
  return { code, stderr }
}

function gone (pid: number): boolean {
  try {
    process.kill(pid, 0)
    return false
  } catch {
    return true
  }
}
