/** `fastify-epd top`: what two readings say, what a terminal gets, and what a pipe gets. */
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { ratesBetween, samplesOf, type Reading } from '../../plugin/cli/top/readings.ts'
import { ProgressLine, Screen, ticking } from '../../plugin/cli/terminal.ts'
import { runCli, runCommand, spawnCli } from '../helper/cli.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, post } from '../helper/fake-gateway.ts'

const node = (url: string): Reading['nodes'][number] => ({ url } as Reading['nodes'][number])
const reading = (seconds: number, text: string, ...urls: string[]): Reading => ({ at: seconds * 1_000, nodes: urls.map(node), samples: samplesOf(text) })

t.test('metrics are read with their labels, and what is none is left out', async t => {
  t.same(samplesOf('# HELP a b\n# TYPE a counter\na 1\nb{x="1",y="a\\"b\\\\n\\n}"} 2.5e3 1700000000\nc{le="+Inf"} +Inf\nd NaN\nnonsense\n{x="1"} 3\n'), [
    { name: 'a', labels: {}, value: 1 },
    { name: 'b', labels: { x: '1', y: 'a"b\\n\n}' }, value: 2_500 },
    { name: 'c', labels: { le: '+Inf' }, value: Infinity }
  ])
})

t.test('lines that never end their labels cost no time', async t => {
  for (const line of ['a{\n', 'a{b="\n', 'a{b="1\n', 'aaaa ', `a{${'b'.repeat(100)}`]) t.same(samplesOf(line.repeat(200_000)), [], line)
  t.same(samplesOf(`a{${'b'.repeat(60_000)}} 1\n`), [{ name: 'a', labels: {}, value: 1 }])
})

t.test('rates are what was gained, also by a gateway that was started again', async t => {
  const page = (ok: number, error: number, calls: number): string => `
epd_requests_total{epd_topology="pd",epd_outcome="ok"} ${ok}
epd_requests_total{epd_topology="e-pd",epd_outcome="ok"} ${ok}
epd_requests_total{epd_topology="pd",epd_outcome="error"} ${error}
epd_requests_in_flight 3
epd_retries_total{error_type="busy"} ${error}
gen_ai_client_token_usage_sum{gen_ai_token_type="input"} 5
gen_ai_client_token_usage_sum{gen_ai_token_type="output"} ${ok * 10}
epd_stage_duration_seconds_count{epd_stage="decode",epd_node="http://n",epd_outcome="ok"} ${calls}
epd_stage_duration_seconds_sum{epd_stage="decode",epd_node="http://n",epd_outcome="ok"} ${calls / 2}
epd_stage_duration_seconds_count{epd_stage="decode",epd_node="http://n",epd_outcome="unavailable"} ${error}
epd_stage_duration_seconds_sum{epd_stage="decode",epd_node="http://n",epd_outcome="unavailable"} ${error / 2}
gen_ai_server_time_to_first_token_seconds_bucket{m="1",le="0.1"} 0
gen_ai_server_time_to_first_token_seconds_bucket{m="1",le="0.2"} ${ok}
gen_ai_server_time_to_first_token_seconds_bucket{m="1",le="+Inf"} ${ok}
`
  const rates = ratesBetween(reading(0, page(10, 1, 20), 'http://n'), reading(2, page(20, 3, 26), 'http://n', 'http://other'))
  t.match(rates, { seconds: 2, requests: { ok: 10, error: 1, refused: 0, aborted: 0 }, inFlight: 3, retriesPerSecond: 1, outputTokensPerSecond: 50, tpotMs: null })
  t.same(rates.nodes['http://n'], { callsPerSecond: 4, failuresPerSecond: 1, meanMs: 500 })
  t.same(rates.nodes['http://other'], { callsPerSecond: 0, failuresPerSecond: 0, meanMs: null })
  t.equal(Math.round(rates.ttftMs!.p50), 150)
  t.match(ratesBetween(reading(0, page(100, 0, 0)), reading(1, page(7, 0, 0))), { requests: { ok: 14 } })
  t.match(ratesBetween(reading(0, ''), reading(0, '')), { requests: { ok: 0 }, ttftMs: null })
  t.equal(ratesBetween(reading(0, ''), reading(1, 'gen_ai_server_time_to_first_token_seconds_bucket{le="10"} 0\ngen_ai_server_time_to_first_token_seconds_bucket{le="+Inf"} 4\n')).ttftMs!.p90, 10_000, 'beyond the last bound')
})

/** A stream that keeps what it gets. */
function terminalOf (more: object): { stream: NodeJS.WriteStream, text: () => string } {
  let text = ''
  return { stream: Object.assign({ write: (part: string) => { text += part; return true } }, more) as unknown as NodeJS.WriteStream, text: () => text }
}

t.test('a screen never gets more lines or columns than it has, and nothing that steers it but its own', async t => {
  for (const rows of [3, 10, 24]) {
    const { stream, text } = terminalOf({ rows, columns: 20 })
    const screen = new Screen(stream)
    screen.show(Array.from({ length: 15 }, (_, i) => `line ${i} \x1b[2J${'x'.repeat(30)}`).join('\n'))
    const [, picture] = text().split('\x1b[H')
    const lines = picture!.split('\n').slice(0, -1)
    t.ok(lines.length < rows || lines.length === 15, `${lines.length} of ${rows}`)
    t.ok(lines.every(line => line.replace('\x1b[K', '').length <= 20))
    t.notMatch(picture, '\x1b[2J')
    screen.close()
    t.ok(text().endsWith('\x1b[?25h\x1b[?1049l'), 'what was there comes back')
  }
})

t.test('a progress line is for terminals', async t => {
  const pipe = terminalOf({ isTTY: false })
  const quiet = new ProgressLine(pipe.stream)
  quiet.update('1 of 2')
  quiet.clear()
  t.equal(pipe.text(), '')
  const terminal = terminalOf({ isTTY: true, columns: 10 })
  const line = new ProgressLine(terminal.stream, 0)
  line.update('a long line of text')
  line.clear()
  line.clear()
  t.equal(terminal.text(), '\r\x1b[Ka long li\r\r\x1b[K')
})

t.test('long work says how long it has taken, on a terminal', async t => {
  const pipe = terminalOf({ isTTY: false })
  ticking(() => 'loading', pipe.stream)()
  t.equal(pipe.text(), '')
  const terminal = terminalOf({ isTTY: true })
  const done = ticking(seconds => `loading m, ${seconds} s`, terminal.stream)
  t.equal(terminal.text(), '\r\x1b[Kloading m, 0 s\r', 'at once')
  done()
  t.ok(terminal.text().endsWith('\r\x1b[K'))
})

t.test('in a pipe one picture is printed, without colours; --count gives more, --json lines', async t => {
  const [one, two] = await Promise.all([FakeNode.start(t), FakeNode.start(t, { role: 'encoder' })])
  const { url } = await buildGateway(t, { nodes: [one, two] })
  await (await post(`${url}/v1/chat/completions`, chat('Hello'))).text()
  const top = async (...args: string[]): Promise<{ code: number | null, stdout: string, stderr: string }> => await runCommand(['top', '--url', url, '--interval', '100ms', ...args])
  const [once, thrice, lines, down, wrong] = await Promise.all([top(), top('--count', '3'), top('--json', '--count', '2'), runCommand(['top', '--url', 'http://127.0.0.1:1']), top('--interval', '1ms')])
  t.match(once, { code: 0, stderr: '' })
  for (const shown of [/2 of 2 nodes healthy/, /requests\/s +[\d.]+ ok, 0\.0 failed/, new RegExp(`${one.url} +hybrid +healthy +0 +0 +[\\d.]+ +0\\.0`)]) t.match(once.stdout, shown)
  t.equal(thrice.stdout.split('NODE ').length, 4)
  t.match(lines.stdout.trim().split('\n').map(line => JSON.parse(line)), [{ seconds: Number, nodes: [{ url: one.url, callsPerSecond: Number }, {}] }, {}])
  t.match(down, { code: 1, stdout: '', stderr: /can't reach the gateway/ })
  t.match(wrong, { code: 2, stderr: /--interval must be 100ms or more/ })
  // eslint-disable-next-line no-control-regex
  t.notMatch(once.stdout + thrice.stdout, /\x1b/)
})

t.test('a gateway without metrics shows its nodes, and a reader that leaves ends the command', async t => {
  const { url } = await buildGateway(t, { nodes: [await FakeNode.start(t)], options: { routes: { metrics: false } } })
  t.match(await runCli(['top', '--url', url, '--interval', '100ms']), { code: 0, stdout: /no rates: the gateway gives no \/metrics[^]*hybrid +healthy/ })
  const endless = spawnCli(t, ['top', '--url', url, '--interval', '100ms', '--count', '100000'])
  await new Promise(resolve => endless.process.stdout.once('data', resolve))
  endless.process.stdout.destroy()
  t.equal(await Promise.race([endless.ended, delay(30_000, 'still there', { ref: false })]), 0)
})
