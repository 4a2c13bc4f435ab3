import axe from 'axe-core'
import type { Browser } from 'playwright-core'
import t from 'tap'
import { TraceStore } from '../../plugin/index.ts'
import { openBrowser } from '../helper/chromium.ts'
import { startCli } from '../helper/cli.ts'
import { buildGateway, chat, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { tempFile } from '../helper/temp.ts'
import { until } from '../helper/until.ts'
import { barriers, BEHIND_CARDS, open, OVERLAPS, shows, storeOf } from './browse.ts'
import { startLoad } from './load.ts'

// Starting engines and a browser takes its time on a busy machine.
t.setTimeout(280_000)
const opened = await openBrowser()
if ('missing' in opened) t.plan(0, opened.missing)
else await suite(opened)

async function suite (browser: Browser): Promise<void> {
  t.teardown(() => browser.close())
  const config = await tempFile(t, 'epd.config.json', JSON.stringify({ embedded: { encoders: 1, engines: 1 }, telemetry: { captureContent: true } }))
  const gateway = await startCli(t, ['serve', '--port', '0', '--log-level', 'warn', '--config', config])
  const load = await startLoad(gateway.url)
  t.teardown(() => load.stop())
  await until(() => load.sent > 8, 'some requests are through', 60_000)

  t.test('while a load runs the page shows nodes, links, requests, figures and the waterfall of one', async t => {
    const { page, problems } = await open(browser, gateway, { width: 1280, height: 860 })
    await page.waitForSelector('.node[data-role=encoder][data-state=healthy]')
    t.equal(await page.locator('.node[data-role=encoder]').count(), 1)
    t.equal(await page.locator('.node[data-role=hybrid]').count(), 1)
    t.match(await page.locator('.links li').first().textContent(), /^E\d → PD1: linked over zmq\+(ipc|tcp), \d.* moved$/)
    await page.waitForSelector('#detail .span[data-role=prefill]')
    const names = await page.locator('#detail .span .name').allTextContents()
    for (const name of ['chat tiny-internvl', 'epd.plan', 'epd.decode', 'engine.prefill']) t.ok(names.includes(name), name)
    t.match(await page.locator('#figures').textContent(), /Encoder cache hits\d+ %\d+ of \d+ pictures/)
    for (const stage of ['request', 'encode', 'generate', 'prefill', 'decode']) t.match(await page.locator(`.stage[data-stage=${stage}] p`).textContent(), /^p50 [\d.]+ m?s/, stage)
    const first = await page.locator('#requests [role=option]').first().getAttribute('data-trace')
    await until(() => page.evaluate(`document.querySelector('#requests [role=option]').dataset.trace !== '${first}'`), 'the page shows it')
    t.pass('new requests come in by themselves')
    // The other tests look at what there is by now: a load costs more than they do.
    await load.stop()
    t.strictSame(await page.evaluate(OVERLAPS), [], 'no text lies on another')
    t.strictSame(problems, [])
    await page.context().close()
  })

  t.test('prefill and decode nodes have columns of their own, with the KV blocks that move between them', async t => {
    const nodes = await Promise.all((['encoder', 'prefill', 'prefill', 'decode', 'hybrid'] as const).map(role => FakeNode.start(t, { role })))
    const store = new TraceStore()
    const { url } = await buildGateway(t, { nodes, options: { ui: true, telemetry: { store } } })
    const p = nodes[1]!.url
    const span = (name: string, n: number, attributes: Record<string, string | number>): void => {
      store.add({ traceId: '1'.repeat(32), spanId: String(n).repeat(16), parentSpanId: n === 1 ? undefined : '1'.repeat(16), name, kind: 'internal', startTime: [Date.now() / 1e3, n * 1e6], endTime: [Date.now() / 1e3, (20 - n) * 1e6], attributes, status: 'unset', service: 's' })
    }
    span('chat vlm', 1, { 'gen_ai.operation.name': 'chat', 'epd.items': 1, 'epd.topology': 'e-p-d', 'epd.reason': '1 item on 1 encoder, long prompt' })
    span('epd.prefill', 2, { 'epd.node': p, 'epd.tokens': 1_500 })
    for (const [i, name] of ['epd.encode.call', 'epd.decode', 'engine.migrate', 'engine.prefill', 'engine.decode'].entries()) span(name, 3 + i, {})
    const { page, problems } = await open(browser, { url }, { width: 1280, height: 860 })
    await page.waitForSelector('.wire[data-kind=kv][data-state=linked]')
    t.strictSame(await page.locator('.column h3').allTextContents(), ['Encode', 'Prefill', 'Decode', 'Prefill + decode'])
    t.strictSame(await page.locator('.node b').allTextContents(), ['E1', 'P1', 'P2', 'D1', 'PD1'])
    t.match(await page.locator('.node[data-role=prefill] .facts').first().textContent(), '0 calls · 0 prompt tokens · vlm')
    const links = await page.locator('.links li').allTextContents()
    t.strictSame(await page.evaluate(BEHIND_CARDS), [], 'no link runs behind a card, where it would seem to end')
    t.ok(links.includes('P1 → D1: linked over fake, 0 B of KV blocks moved'))
    t.ok(links.includes('E1 → P2: linked over fake, 0 B moved'))
    t.equal(await page.locator('#detail .why .plan').textContent(), 'e-p-d')
    t.match(await page.locator('#detail .span[data-role=prefill]').first().textContent(), /epd\.prefill.*P1 · 1500 tokens/)
    t.match(await page.locator('.stage[data-stage=handoff] p').textContent(), /^p50/)
    for (const width of [1280, 1000, 760]) {
      await page.setViewportSize({ width, height: 860 })
      t.strictSame(await page.evaluate("[...document.querySelectorAll('.stage p')].filter(p => p.scrollWidth > p.clientWidth).length"), 0, `figures below the charts fit at ${width} pixels`)
    }
    await page.setViewportSize({ width: 390, height: 844 })
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390)
    t.strictSame(problems, [])
    await page.context().close()
  })

  t.test('a gateway that is started again is found again, and its figures begin anew', async t => {
    const node = await FakeNode.start(t)
    const options = { ui: true, telemetry: { store: storeOf(1) } }
    const first = await buildGateway(t, { nodes: [node], options })
    for (let n = 0; n < 5; n++) await (await post(`${first.url}/v1/chat/completions`, chat('hello'))).arrayBuffer()
    const { page } = await open(browser, first, { width: 1280, height: 860 })
    t.match(await page.locator('#figures').textContent(), /Requests[\d.]+\/s5 in all/)
    await first.app.close()
    await page.waitForSelector('#live[data-state=off]')
    await buildGateway(t, { nodes: [node], options: { ...options, telemetry: { store: storeOf(2) } }, port: Number(new URL(first.url).port) })
    await page.waitForSelector('#live[data-state=on]')
    await until(async () => /0 in all/.test(String(await page.locator('#figures').textContent())), 'the figures are the new one\'s')
    t.equal(await page.locator('#requests').getAttribute('aria-activedescendant'), null, 'the row that was selected is gone')
    await page.locator('#requests [role=option]').click()
    await shows(page, '2'.repeat(32))
    await page.context().close()
  })

  t.test('a page without requests, or without traces, says so', async t => {
    for (const [telemetry, text] of [[{ store: new TraceStore() }, 'No requests here yet.'], [{ traces: false }, 'No traces are kept here: the option telemetry.traces is false.']] as const) {
      const { url } = await buildGateway(t, { options: { ui: true, telemetry } })
      const context = await browser.newContext()
      const page = await context.newPage()
      await page.goto(`${url}/epd/`)
      await page.waitForSelector('#requests .empty')
      t.equal(await page.locator('#requests').textContent(), text)
      await context.close()
    }
  })

  t.test('counters that go back make no rate below zero', async t => {
    const { url } = await buildGateway(t, { options: { ui: true } })
    const context = await browser.newContext()
    const page = await context.newPage()
    const health = { status: 'healthy', nodes: { healthy: 1, total: 1 }, models: [] }
    const state = (at: number, count: number): string => `data: ${JSON.stringify({
      at, version: '1', health, inFlight: 0, requests: count === 0 ? [] : [{ plan: 'pd', outcome: 'ok', count }], retries: 0, admission: { inFlight: 0, waiting: 0, refused: 0 }, nodes: [], links: [], traces: [], lately: {}, capture: false
    })}\n\n`
    const body = state(1e6, 50) + state(1e6 + 10_000, 80)
    await page.route('**/epd/feed', route => route.fulfill({ contentType: 'text/event-stream', body }))
    await page.goto(`${url}/epd/`)
    await until(async () => await page.locator('#figures dd').first().textContent() === '3.0/s80 in all', 'the rate is shown')
    await page.unroute('**/epd/feed')
    await page.route('**/epd/feed', route => route.fulfill({ contentType: 'text/event-stream', body: state(1e6 + 20_000, 0) + state(1e6 + 26_000, 6) }))
    await until(async () => await page.locator('#figures dd').first().textContent() === '1.0/s6 in all', 'and that of the gateway as it was started again')
    await context.close()
  })

  t.test('a page that was refused, hidden and shown again asks for one feed only', async t => {
    const { url } = await buildGateway(t, { options: { ui: true } })
    const context = await browser.newContext()
    const page = await context.newPage()
    await page.clock.install()
    let asked = 0
    await page.route('**/epd/feed', async route => {
      asked++
      await route.fulfill({ status: 503, json: {} })
    })
    await page.goto(`${url}/epd/`)
    const refused = (times: number): Promise<unknown> => until(async () => asked >= times && await page.locator('#live').textContent() === 'refused', 'it is refused')
    await refused(1)
    const look = (hidden: boolean): Promise<unknown> => page.evaluate(`Object.defineProperty(document, 'hidden', { configurable: true, value: ${hidden} }), document.dispatchEvent(new Event('visibilitychange'))`)
    await look(true)
    await page.clock.runFor(10_000)
    t.equal(asked, 1, 'a hidden page asks for nothing')
    for (let n = 0; n < 3; n++) {
      await look(true)
      await look(false)
      await refused(2 + n)
    }
    t.equal(asked, 4)
    await page.clock.runFor(3_500)
    await refused(5)
    await page.clock.runFor(1_000)
    t.equal(asked, 5, 'one more after three seconds')
    await context.close()
  })

  t.test('spans with values of any type are shown, and the page says when a trace is no longer kept', async t => {
    const store = storeOf(1)
    const seconds = Math.floor(Date.now() / 1e3)
    store.add({ traceId: '1'.repeat(32), spanId: '2'.repeat(16), parentSpanId: '1'.repeat(16), name: 'epd.encode', kind: 'internal', startTime: [seconds, 0], endTime: [seconds, 1e6], attributes: { 'epd.node': 7, 'epd.queue_ms': '3', 'epd.encoders': [1], 'epd.bytes': 'many' }, status: 'unset', service: 's' })
    const { url } = await buildGateway(t, { options: { ui: true, telemetry: { store } } })
    const { page, problems } = await open(browser, { url }, { width: 1280, height: 860 })
    await shows(page, '1'.repeat(32))
    t.match(await page.locator('#detail .span .facts').last().textContent(), /7.*waited 3\.00 ms/)
    await page.click('#pause')
    await page.route('**/epd/traces/*', route => route.fulfill({ status: 404, json: {} }))
    await page.locator('#requests [role=option]').click()
    await page.waitForSelector('#detail .empty')
    t.match(await page.locator('#detail').textContent(), /no longer kept/)
    t.strictSame(problems.filter(problem => !problem.includes('404')), [])
    await page.context().close()
  })

  t.test('a click shows another request, its pictures and its spans\' attributes', async t => {
    const { page, problems } = await open(browser, gateway, { width: 1280, height: 860 })
    await page.click('#pause')
    const row = page.locator('#requests [role=option]', { hasText: '2 images' }).first()
    const id = await row.getAttribute('data-trace')
    await row.click()
    t.equal(await row.getAttribute('aria-selected'), 'true')
    await shows(page, id)
    t.equal(await page.locator('.pictures li').count(), 2)
    await until(() => page.evaluate("[...document.querySelectorAll('.pictures img')].filter(image => image.naturalWidth > 0).length === 2"), 'the page shows it')
    t.match(await page.locator('.pictures li').first().textContent(), /picture 1(cached|encoded)E\d\d+ tokens/)
    await page.locator('#detail .span summary').first().click()
    t.match(await page.locator('#detail .span[open] .attributes').textContent(), /gen_ai\.operation\.namechat/)
    t.strictSame(problems, [])
    await page.context().close()
  })

  t.test('a stream shows its tokens and their times, also when its client did not ask for usage', async t => {
    const answer = await post(`${gateway.url}/v1/chat/completions`, { model: 'tiny-internvl', stream: true, temperature: 0, max_tokens: 12, messages: [{ role: 'user', content: 'How many red circles are there?' }] })
    t.notMatch(await answer.text(), /"usage":\s*\{/)
    const id = answer.headers.get('x-epd-trace-id')!
    const { page, problems } = await open(browser, gateway, { width: 1280, height: 860, hash: `#trace=${id}&search=${id}`, selected: false })
    await shows(page, id)
    await until(async () => /^first token[\d.]+ m?sper token[\d.]+ m?srate[\d.]+ tokens\/stokens\d+ → \d+$/.test(String(await page.locator('.sums').textContent())), 'the engine\'s spans say how many')
    t.match(await page.locator(`[data-trace="${id}"] .tokens`).textContent(), /^\d+ → \d+$/)
    await page.getByRole('link', { name: 'PD1' }).click()
    await until(async () => /KV cache in use\d+ %feature cache filled\d+ %/.test(String(await page.locator('#node').textContent())), 'and its node says how full its caches are')
    t.strictSame(problems, [])
    await page.context().close()
  })

  t.test('the keyboard alone is enough', async t => {
    const { page } = await open(browser, gateway, { width: 1280, height: 860 })
    await page.keyboard.press('Tab')
    t.equal(await page.evaluate('document.activeElement.className'), 'skip', 'the first stop is the skip link')
    await page.keyboard.press('Enter')
    t.equal(await page.evaluate('document.activeElement.id'), 'requests', 'and it leads to the list')
    for (let i = 0; i < 40 && await page.evaluate('document.activeElement.id') !== 'pause'; i++) await page.keyboard.press('Shift+Tab')
    await page.keyboard.press('Space')
    t.equal(await page.locator('#pause').textContent(), 'Resume')
    await page.focus('#requests')
    await page.keyboard.press('Home')
    const selected = (): Promise<string | null> => page.locator('#requests [aria-selected=true]').getAttribute('data-trace')
    const first = await selected()
    await page.keyboard.press('ArrowDown')
    await page.keyboard.press('ArrowDown')
    const third = await selected()
    t.not(third, first)
    t.equal(await page.locator('#requests').getAttribute('aria-activedescendant'), `r${third}`)
    await shows(page, third)
    await page.keyboard.press('ArrowUp')
    await page.keyboard.press('ArrowUp')
    t.equal(await selected(), first)
    await shows(page, first)
    await page.keyboard.press('Tab')
    t.equal(await page.evaluate('document.activeElement.name'), 'compare', 'behind the list are the request\'s button and its spans')
    await page.keyboard.press('Tab')
    await page.keyboard.press('Enter')
    t.ok(await page.locator('#detail .span[open]').count() > 0, 'a span opens with Enter')
    const outline = await page.evaluate('getComputedStyle(document.activeElement).outlineStyle')
    t.equal(outline, 'solid', 'focus is visible')
    await page.context().close()
  })

  t.test('the theme follows the system and the switch, which it remembers', async t => {
    const { page } = await open(browser, gateway, { width: 1280, height: 860, dark: true })
    const background = (): Promise<string> => page.evaluate('getComputedStyle(document.body).backgroundColor')
    const dark = await background()
    await page.click('#theme')
    const light = await background()
    t.not(light, dark)
    await page.reload()
    await page.waitForSelector('.node')
    t.equal(await background(), light)
    t.equal(await page.locator('#theme').textContent(), 'Theme: light')
    await page.click('#theme')
    t.equal(await background(), dark)
    await page.context().close()
  })

  t.test('filters ask the gateway, by plan and by duration', async t => {
    const { page } = await open(browser, gateway, { width: 1280, height: 860 })
    await page.selectOption('#filter [name=plan]', 'pd')
    await until(() => page.evaluate("[...document.querySelectorAll('#requests [role=option] .plan')].every(plan => plan.textContent === 'pd')"), 'the page shows it')
    t.ok(await page.locator('#requests [role=option]').count() > 0)
    await page.fill('#filter [name=min]', '600000')
    await page.waitForSelector('#requests .empty')
    t.equal(await page.locator('#requests').textContent(), 'No request like that.')
    await page.context().close()
  })

  t.test('axe finds no barrier, light and wide or dark and narrow', async t => {
    for (const [width, dark] of [[1280, false], [390, true]] as const) {
      const { page } = await open(browser, gateway, { width, height: 860, dark })
      await page.click('#pause')
      await page.locator('#detail .span summary').first().click()
      t.strictSame(await page.evaluate(barriers(axe.source)), [], `${width} pixels, ${dark ? 'dark' : 'light'}`)
      await page.context().close()
    }
  })

  t.test('at 390 pixels everything is in one column and nothing sticks out', async t => {
    const { page, problems } = await open(browser, gateway, { width: 390, height: 844 })
    await page.waitForSelector('#detail .span')
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390)
    t.strictSame(await page.evaluate(OVERLAPS), [], 'no text lies on another')
    await page.emulateMedia({ colorScheme: 'dark' })
    t.strictSame(problems, [])
    await page.context().close()
  })
}
