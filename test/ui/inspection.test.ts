import axe from 'axe-core'
import type { Browser } from 'playwright-core'
import t from 'tap'
import { TraceStore } from '../../plugin/index.ts'
import { openBrowser } from '../helper/chromium.ts'
import { buildGateway } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { until } from '../helper/until.ts'
import { barriers, open, OVERLAPS, shows, storeOf } from './browse.ts'
import { failingScene, manyScene, nodeScene } from './scenes.ts'

const SIZE = { width: 1280, height: 860 }
/** What a client may call a model, and a node an error. */
const HOSTILE = [
  '<img src=x onerror="document.title=1">', '</script><script>document.title=1</script>', "javascript:alert('1')", '"><svg onload=alert(1)>&lt;b&gt;',
  '\u202eesrever\u0000\u001b[31m\n\n\t', 'x'.repeat(1_000), '__proto__', 'constructor', 'toString'
] as const

t.setTimeout(280_000)
const opened = await openBrowser()
if ('missing' in opened) t.plan(0, opened.missing)
else await suite(opened)

async function suite (browser: Browser): Promise<void> {
  t.teardown(() => browser.close())

  t.test('an error is seen where it is: in its row, with its attempts, and in the figures', async t => {
    const scene = await failingScene(t)
    const { page, problems } = await open(browser, scene, SIZE)
    const row = (status: string, at = 0): ReturnType<typeof page.locator> => page.locator(`#requests [data-status=${status}]`).nth(at)
    t.equal(await page.locator('#requests [data-status=error]').count(), 1)
    t.match(await row('error').locator('.reason').textContent(), /^UNAVAILABLE · decode on PD\d, attempt 2 · PD\d answered 500: scripted failed$/)
    t.match(await row('error').getAttribute('aria-label'), /error, .*UNAVAILABLE · decode on PD\d, attempt 2/)
    t.match(await row('refused').locator('.reason').textContent(), /^REJECTED · decode on PD\d, attempt 1 · /)
    t.match(await row('ok').locator('.reason').textContent(), /^encode on E\d, attempt 1: UNAVAILABLE · E\d answered 500/, 'of a request that went well, what had failed')
    t.match(await page.locator('.figure', { hasText: 'Errors' }).textContent(), /^Errors11 refused, \d retried$/)
    const [background, plain] = await page.evaluate("[document.querySelector('#requests [data-status=error]'), document.querySelector('#requests [data-status=ok]')].map(row => getComputedStyle(row).backgroundColor)") as string[]
    t.not(background, plain, 'its row is red')

    await row('error').click()
    await shows(page, await row('error').getAttribute('data-trace'))
    t.match(await page.locator('.failure').textContent(), /^UNAVAILABLE status 500/)
    const steps = await page.locator('.attempts li').allTextContents()
    t.strictSame(steps.map(step => step.replace(/\d+(\.\d+)? m?s/, '').replace(/(E|PD)\d/g, '$1')), [
      'attempt 1encode on Eanswered after ',
      'decode on PDfailed after UNAVAILABLE: PD answered 500: scripted failed',
      'attempt 2encode on Eanswered after ',
      'decode on PDfailed after UNAVAILABLE: PD answered 500: scripted failed'
    ])
    const nodes = steps.filter(step => step.startsWith('decode')).map(step => /PD\d/.exec(step)![0])
    t.not(nodes[0], nodes[1], 'another node was tried next')
    t.equal(await page.locator('.outcome').textContent(), 'Nothing else was tried.')
    t.equal(await page.locator('#detail .span .name.failed').count(), 3, 'the request and its two calls')
    t.strictSame(await page.evaluate(OVERLAPS), [], 'no text lies on another')

    await page.locator('#requests [data-status=ok]', { has: page.locator('.reason') }).click()
    await until(async () => await page.locator('.failure[data-status=ok]').count() === 1, 'what failed on the way is shown')
    t.match(await page.locator('.failure').textContent(), /1 call failed on the way.*attempt 1encode on E\dfailed after .*Then encode on E\d, decode on PD\d answered\.$/)

    await page.getByRole('link', { name: 'Errors' }).click()
    await until(async () => await page.locator('#requests [role=option]').count() === 1, 'the figure leads to the list of them')
    t.match(page.url(), /#.*status=error/)
    await until(async () => await page.locator('#found').textContent() === '1 found', 'and says how many')

    await page.setViewportSize({ width: 390, height: 844 })
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390)
    t.strictSame(problems, [])
    await page.context().close()
  })

  t.test('a link brings back request, filter and search after a reload and for others, whatever stands in it', async t => {
    const store = new TraceStore()
    const { url } = await buildGateway(t, { nodes: [await FakeNode.start(t)], options: { ui: true, telemetry: { store } } })
    // More than the feed holds: only the gateway can search all.
    for (let n = 1; n <= 200; n++) {
      const failed = n === 3
      store.add({ traceId: n.toString(16).padStart(32, '0'), spanId: n.toString(16).padStart(16, '0'), parentSpanId: undefined, name: 'chat vlm', kind: 'client', startTime: [1_800_000_000 + n, 0], endTime: [1_800_000_000 + n, 5e6], attributes: { 'gen_ai.operation.name': 'chat', 'gen_ai.request.model': n === 5 ? 'rare-model' : 'vlm', 'epd.key': n % 2 === 0 ? 'team-a' : 'team-b', ...(failed ? { 'error.type': 'EPD_ERR_DEADLINE' } : {}) }, status: failed ? 'error' : 'unset', message: failed ? 'too late' : undefined, service: 's' })
    }
    const { page, problems } = await open(browser, { url }, SIZE)
    const rows = (): Promise<Array<string | null>> => page.locator('#requests [role=option]').evaluateAll(all => all.map(row => row.getAttribute('data-trace'))) as Promise<Array<string | null>>
    const listed = async (...numbers: number[]): Promise<void> => {
      const wanted = String(numbers.map(n => n.toString(16).padStart(32, '0')))
      await until(async () => String(await rows()) === wanted, `the list has ${wanted}, not ${await rows()}`)
    }
    t.equal((await rows()).length, 60)
    t.notMatch(page.url(), /#/, 'what the page has chosen by itself is not in the address')
    await page.fill('#filter [name=search]', 'deadline team-b')
    await listed(3)
    await page.locator('#requests [role=option]').click()
    t.equal(new URL(page.url()).hash, `#trace=${'3'.padStart(32, '0')}&search=deadline+team-b`)
    await page.reload()
    await listed(3)
    t.equal(await page.inputValue('#filter [name=search]'), 'deadline team-b')
    await shows(page, '3'.padStart(32, '0'))
    for (const [text, n] of [['rare', 5], ['5'.padStart(32, '0'), 5], ['EPD_ERR_DEADLINE', 3]] as const) {
      await page.fill('#filter [name=search]', text)
      await listed(n)
    }
    await page.fill('#filter [name=search]', '<img src=x onerror=alert(1)>')
    await page.waitForSelector('#requests .empty')
    await page.fill('#filter [name=search]', '')
    await until(async () => (await rows()).length === 60, 'the search is over')

    const other = await open(browser, { url }, { ...SIZE, hash: `#trace=${'7'.padStart(32, '0')}`, selected: false })
    await shows(other.page, '7'.padStart(32, '0'))
    t.pass('a trace that is no longer in the list is shown')
    for (const hash of ['#trace=<b>x</b>', '#trace=../../health&search=%00&plan=%F0%9F&min=NaN&range=9y', `#search=${'x'.repeat(5_000)}`, '#%', `#trace=${'f'.repeat(32)}`, '#requests', '#__proto__=1&constructor=2']) {
      await other.page.evaluate(`location.hash = ${JSON.stringify(hash)}`)
      if (hash.includes('<')) await other.page.reload()
      await other.page.waitForSelector(hash.includes('fff') ? '#detail .empty' : '#requests [role=option], #requests .empty')
    }
    t.strictSame([...problems, ...other.problems].filter(problem => !problem.includes('404')), [])
    await page.context().close()
    await other.page.context().close()
  })

  t.test('charts have axes and a time range, and show what failed', async t => {
    const store = new TraceStore()
    const now = Math.floor(Date.now() / 1e3)
    for (let minute = 0; minute < 58; minute++) {
      for (const [i, ms] of [12, 30, 90].entries()) {
        const id = String(1_000 + minute * 10 + i).padStart(16, '1')
        store.add({ traceId: id + id, spanId: id, parentSpanId: undefined, name: 'chat vlm', kind: 'client', startTime: [now - 60 * minute, 0], endTime: [now - 60 * minute, ms * 1e6], attributes: { 'gen_ai.operation.name': 'chat', 'gen_ai.response.time_to_first_chunk': 0.01, 'gen_ai.usage.output_tokens': 5 }, status: minute === 30 ? 'error' : 'unset', service: 's' })
      }
    }
    const { url } = await buildGateway(t, { options: { ui: true, telemetry: { store } } })
    const { page, problems } = await open(browser, { url }, SIZE)
    const chart = page.locator('.stage[data-stage=request]')
    const bars = (): Promise<number> => chart.locator('.range').count()
    await until(async () => await bars() >= 4, 'five minutes are drawn')
    t.ok(await bars() <= 6, `${await bars()} slots`)
    const label = (await chart.locator('svg').getAttribute('aria-label'))!
    t.match(label, /^Request: median (2[7-9]|3[0-3])(\.\d)? ms, 95th percentile (8[2-9]|9\d|100)(\.\d)? ms, \d+ calls went well, 0 failed$/)
    t.ok((await chart.locator('.y').allTextContents()).every(text => /^\d+ ms$/.test(text)))
    t.ok(await chart.locator('.y').count() >= 2, 'an axis of durations')
    t.ok((await chart.locator('.x').allTextContents()).every(text => /^\d\d:\d\d$/.test(text)))
    t.ok(await chart.locator('.x').count() >= 1, 'and one of time')
    t.match(await page.locator('.stage[data-stage=firstToken] p').textContent(), /^p50 (9|10|11)\.\d+ ms/)
    t.match(await page.locator('.figure[data-name="First token"]').textContent(), /^First token(9|10|11)\.\d+ msp95/)
    t.match(await page.locator('.figure[data-name="Per token"]').textContent(), /^Per token\d\.\d+ ms\d+ tokens\/s a stream$/)

    await page.getByRole('button', { name: '1 h' }).click()
    await until(async () => await bars() >= 55, 'the hour is drawn')
    t.equal(await chart.locator('rect.failed').count(), 1)
    t.match(await chart.locator('p').textContent(), /3 failed$/)
    t.equal(await page.locator('#range').textContent(), 'last hour')
    t.equal(new URL(page.url()).hash, '#range=1h')
    await page.reload()
    await until(async () => await bars() >= 55, 'a reload keeps the range')
    t.equal(await page.getByRole('button', { name: '1 h' }).getAttribute('aria-pressed'), 'true')
    await page.setViewportSize({ width: 390, height: 844 })
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390)
    t.strictSame(problems, [])
    await page.context().close()
  })

  t.test('a node has a view with its breakers, load, links and last errors, and leads to its requests', async t => {
    const scene = await nodeScene(t)
    const { page, problems } = await open(browser, scene, SIZE)
    const dialog = page.locator('#node')
    await page.locator('.node', { hasText: 'PD2' }).getByRole('link').click()
    await until(() => dialog.isVisible(), 'the view is open')
    t.equal(new URL(page.url()).hash, scene.hash)
    t.match(await dialog.locator('h2').textContent(), /^PD2 hybrid$/)
    t.match(await dialog.locator('.breakers li').allTextContents(), ['encode closed', 'prefill closed', /^decode (half-)?open$/])
    t.strictSame(await dialog.locator('[data-link]').allTextContents(), ['from E1linked over fake'])
    await until(async () => /running, as it says8waiting, as it says3KV cache in use72 %/.test(String(await dialog.textContent())), 'the node has said how full it is')
    const errors = dialog.locator('ol.rows li')
    t.equal(await errors.count(), 3)
    t.match(await errors.first().textContent(), /^\d\d:\d\d:\d\depd\.decodeUNAVAILABLEPD2 answered 500: scripted failed$/)
    t.match(await page.locator('.node', { hasText: 'PD2' }).textContent(), /3 waitingKV {2}72 %decode breaker (half-)?open/, 'its card says so too')
    t.strictSame(await page.evaluate(barriers(axe.source)), [], 'axe finds no barrier')
    const trace = new URLSearchParams(new URL((await errors.first().getByRole('link').getAttribute('href'))!, page.url()).hash.slice(1)).get('trace')
    await errors.first().getByRole('link').click()
    await until(async () => !await dialog.isVisible(), 'the view is closed')
    await shows(page, trace)
    await page.goBack()
    await until(() => dialog.isVisible(), 'Back opens it again')
    await page.reload()
    await until(() => dialog.isVisible(), 'and a reload keeps it')
    await dialog.getByRole('link', { name: 'E1' }).click()
    await until(async () => await dialog.locator('h2').textContent() === 'E1 encoder', 'from node to node')
    await until(async () => /feature cache filled65 %/.test(String(await dialog.textContent())), 'the encoder has said how full it is')
    await page.keyboard.press('Escape')
    await until(async () => !await dialog.isVisible(), 'Escape closes it')
    await until(() => !/node=/.test(page.url()), 'and takes it out of the address')
    await page.evaluate("location.hash = '#node=http%3A%2F%2F<b>nowhere'")
    await until(async () => /No such node here/.test(String(await dialog.textContent())), 'a node that is not there is named')
    t.equal(await dialog.locator('b').count(), 0)
    t.equal(await dialog.getByRole('button', { name: 'Drain' }).isVisible(), false)
    await page.setViewportSize({ width: 390, height: 844 })
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390)
    t.strictSame(problems.filter(problem => !problem.includes('404')), [])
    await page.context().close()
  })

  t.test('a node is drained and taken back, from another machine with the admin key only', async t => {
    const nodes = [await FakeNode.start(t), await FakeNode.start(t)]
    const { url, app } = await buildGateway(t, { nodes, options: { ui: true, prefix: '/llm', adminKey: 'root-key', telemetry: { store: storeOf(1) } } })
    const id = nodes[0]!.url
    const drained = (): boolean => app.epd.nodes.snapshot().byId.get(id)!.drained === true
    // As a reverse proxy hands on: the client is not this machine.
    const context = await browser.newContext({ viewport: SIZE, httpCredentials: { username: 'admin', password: 'root-key' }, extraHTTPHeaders: { 'x-forwarded-for': '203.0.113.9' } })
    const page = await context.newPage()
    await page.goto(`${url}/llm/epd/#node=${encodeURIComponent(id)}`)
    const dialog = page.locator('#node')
    await dialog.getByRole('button', { name: 'Drain' }).click()
    await until(() => dialog.locator('form').isVisible(), 'the key is asked for')
    t.equal(drained(), false)
    await page.keyboard.type('wrong')
    await page.keyboard.press('Enter')
    await until(async () => await dialog.getByRole('status').textContent() === 'That is not the admin key.', 'a wrong key is refused')
    t.equal(drained(), false)
    await page.keyboard.type('root-key')
    await page.keyboard.press('Enter')
    await until(() => drained(), 'it is drained')
    await until(async () => await dialog.getByRole('button', { name: 'Take back into use' }).isVisible(), 'and can be taken back')
    t.match(await dialog.getByRole('status').textContent(), /no further requests/)
    t.equal(await dialog.locator('.pill').textContent(), 'draining')
    await dialog.getByRole('button', { name: 'Take back into use' }).click()
    await until(() => !drained(), 'the key is known by now')
    t.equal(await dialog.locator('form').isVisible(), false)
    t.notMatch(await page.evaluate('JSON.stringify([{ ...localStorage }, { ...sessionStorage }, location.href, document.documentElement.outerHTML])'), /root-key/, 'the key is kept nowhere')
    await context.close()
  })

  t.test('two requests are compared stage by stage, by mouse, keyboard and link', async t => {
    const scene = await failingScene(t)
    const { page, problems } = await open(browser, scene, SIZE)
    await page.click('#pause')
    const [well, failed] = await Promise.all(['ok', 'error'].map(async status => (await page.locator(`#requests [data-status=${status}]`).last().getAttribute('data-trace'))!)) as [string, string]
    await page.locator(`[data-trace="${well}"]`).click()
    await shows(page, well)
    await page.getByRole('button', { name: 'Compare' }).click()
    await until(() => page.locator('.hint').isVisible(), 'the page asks for the other one')
    t.equal(await page.evaluate('document.activeElement.name'), 'end', 'the focus stays here')
    await page.locator(`[data-trace="${failed}"]`).click()
    await page.waitForSelector('.stages-of')
    t.equal(new URL(page.url()).hash, `#trace=${failed}&compare=${well}`)
    t.ok(await page.locator(`#requests .compared[data-trace="${well}"]`).isVisible(), 'the list shows both')
    const cells = (table: string): Promise<string[][]> => page.locator(`.${table} [role=row]`).evaluateAll(rows => rows.map(row => [...row.children].map(cell => cell.textContent ?? '')))
    const sides = await cells('sides')
    t.match(sides.find(([name]) => name === 'status'), ['status', 'ok', 'error: UNAVAILABLE', ''])
    t.match(sides.find(([name]) => name === 'failed calls'), ['failed calls', '0', '2', ''])
    t.match(sides.find(([name]) => name === 'duration')![3], /^[+−][\d.]+ m?s/)
    // The gateway notes how long a body took to come only when that was long.
    const stages = (await cells('stages-of')).slice(1).filter(([name]) => !name!.startsWith('epd.receive'))
    t.strictSame(stages.slice(0, 9).map(([name]) => /^[a-z.]+/.exec(name!)![0]), ['request', 'epd.plan', 'epd.encode', 'epd.encode.call', 'epd.decode', 'epd.plan', 'epd.encode', 'epd.encode.call', 'epd.decode'])
    t.match(stages[1]![2], /ms$/)
    t.ok(stages.slice(5).every(row => row[2] === '–' && row[4] === 'only in B'), 'the second attempt has no counterpart')
    t.equal(await page.locator('.stages-of .failed').count(), 3)
    t.strictSame(await page.evaluate(barriers(axe.source)), [], 'axe finds no barrier')
    await page.getByRole('button', { name: 'Swap' }).click()
    await until(async () => (await cells('sides')).some(row => String(row).startsWith('status,error: UNAVAILABLE,ok')), 'A and B change places')
    await page.reload()
    await page.waitForSelector('.stages-of')
    t.equal(new URL(page.url()).hash, `#trace=${well}&compare=${failed}`)
    await page.focus('#requests')
    await page.keyboard.press('Home')
    await until(async () => await page.locator('.stages-of').count() === 0 || (await cells('sides')).length > 0, 'another one is compared with the same')
    t.match(page.url(), new RegExp(`compare=${failed}`))
    await page.setViewportSize({ width: 390, height: 844 })
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390)
    scene.store.clear()
    await page.reload()
    await until(async () => /no longer kept/.test(String(await page.locator('#detail').textContent())), 'what is not kept is said')
    t.strictSame(problems.filter(problem => !problem.includes('404')), [])
    await page.context().close()
  })

  t.test('forty nodes stay readable: tiles, what is wrong in words, and the links of one at a time', async t => {
    const scene = await manyScene(t)
    const [e4, e7, d6] = [scene.nodes[3]!, scene.nodes[6]!, scene.nodes[25]!]
    const { page, problems } = await open(browser, scene, SIZE)
    await page.waitForSelector('.tiles .node[data-state=unhealthy]')
    t.equal(await page.locator('.tiles .node').count(), 40)
    t.strictSame(await page.locator('.column h3').allTextContents(), ['Encode 11 of 12 healthy', 'Prefill 7 of 8 healthy', 'Decode 12 of 12 healthy', 'Prefill + decode 8 of 8 healthy'])
    const links = await page.locator('.links li').allTextContents()
    t.ok(links.includes('E7 → 16 nodes: refused (another fingerprint)'), 'links that share a fault are one line')
    t.ok(links.length <= 5, links.join('; '))
    t.ok(links.some(link => /^Prefill → Decode: 96 of 96 links, /.test(link)))
    t.match(await page.locator(`[data-id="${d6.url}"]`).textContent(), /decode (half-)?open/)
    t.match(await page.locator(`[data-id="${e4.url}"]`).textContent(), /^E4unhealthy/)
    t.equal(await page.evaluate('(box => box.scrollHeight <= box.clientHeight + 1)(document.querySelector("#topology"))'), true, 'nothing is hidden')
    t.ok(await page.evaluate('document.querySelector("#requests-title").getBoundingClientRect().bottom < innerHeight'), 'the requests are in sight')
    await until(async () => await page.locator('.tiles .gauges:not(:empty)').count() >= 38, 'the nodes have said how full they are')
    t.strictSame(await page.evaluate(barriers(axe.source)), [], 'axe finds no barrier')

    const peers = (state: string): Promise<number> => page.locator(`.node[data-peer=${state}]`).count()
    await page.locator(`[data-id="${e7.url}"]`).hover()
    t.strictSame([await peers('self'), await peers('refused'), await peers('linked')], [1, 16, 0])
    await page.locator('#figures').hover()
    t.equal(await page.locator('.looking').count(), 0)
    await page.locator('.node', { hasText: 'P1' }).first().getByRole('link').focus()
    t.strictSame([await peers('self'), await peers('linked')], [1, 23], 'the keyboard shows them too: eleven encoders, but for the refused one and the dead one still linked, and twelve decode nodes')
    await page.keyboard.press('Enter')
    await until(async () => /^P1/.test(String(await page.locator('#node h2').textContent())), 'Enter opens the view')
    await page.keyboard.press('Escape')
    await page.setViewportSize({ width: 390, height: 844 })
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390)
    t.strictSame(problems, [])
    await page.context().close()
  })

  t.test('whatever clients and nodes say is text, in the list, the waterfall, a comparison and a node\'s view', async t => {
    const store = new TraceStore()
    const nodes = [await FakeNode.start(t, { models: ['vlm', HOSTILE[0]] }), await FakeNode.start(t, { role: 'encoder' })]
    nodes[0]!.metrics = `vllm:num_requests_waiting{model_name="${HOSTILE[0]}"} 1e9\n`
    const { url } = await buildGateway(t, { nodes, options: { ui: true, telemetry: { store } } })
    const now = Math.floor(Date.now() / 1e3)
    const ids = HOSTILE.map((_, n) => String(n + 1).repeat(32))
    for (const [n, text] of HOSTILE.entries()) {
      const names = ['gen_ai.request.model', 'epd.topology', 'epd.reason', 'epd.key', 'error.type', 'epd.peer', 'epd.link', 'epd.queue_ms', 'epd.items', 'epd.tokens', 'epd.bytes', 'epd.cached', 'epd.batch', 'epd.retries', text]
      const attributes = { ...Object.fromEntries(names.map(name => [name, text])), 'epd.encoders': [text, 7, true], 'epd.item.tokens': [text], 'epd.item.cached': [text] }
      const span = (spanId: string, name: string, more: object): void => { store.add({ traceId: ids[n]!, spanId, parentSpanId: spanId === '1' ? undefined : '1', name, kind: 'client', startTime: [now, 0], endTime: [now, 7e6], attributes: { ...attributes, ...more }, status: 'error', message: text, service: text, instance: text }) }
      span('1', text, { 'gen_ai.operation.name': text, 'gen_ai.response.time_to_first_chunk': NaN, 'gen_ai.usage.output_tokens': Infinity })
      span('2', 'epd.decode', { 'epd.node': nodes[0]!.url })
      span('3', 'epd.encode', { 'epd.node': text })
      span('4', 'epd.encode.call', { 'epd.node': text })
      span('5', text, {})
    }
    const { page, problems } = await open(browser, { url }, SIZE)
    const elements = (): Promise<number> => page.evaluate("document.querySelectorAll('script, img:not([src^=pictures]):not([src=\"icon.svg\"]), iframe, b b, svg svg, a[href^=javascript]').length")
    const own = await elements()
    for (const [n, id] of ids.entries()) {
      await page.evaluate(`location.hash = 'trace=${id}${n > 0 ? `&compare=${ids[n - 1]}` : ''}'`)
      await page.waitForSelector(n > 0 ? '.stages-of' : '#detail .failure')
      await until(async () => String(await page.locator('#detail').textContent()).includes(HOSTILE[n]!.trim().slice(0, 20)), `the page shows ${HOSTILE[n]}`)
      t.equal(await elements(), own)
    }
    for (const node of nodes) {
      await page.evaluate(`location.hash = 'search=${encodeURIComponent(HOSTILE[0])}&node=${encodeURIComponent(node.url)}'`)
      await until(async () => String(await page.locator('#node .id').textContent()).includes(node.url), 'its view is open')
    }
    await page.evaluate(`location.hash = 'node=${encodeURIComponent(nodes[0]!.url)}'`)
    await until(async () => await page.locator('#node ol.rows li').count() === HOSTILE.length, 'the errors are listed')
    t.equal(await elements(), own)
    t.strictSame(problems, [])
    await page.setViewportSize({ width: 390, height: 844 })
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390, 'long texts do not widen it')
    await page.context().close()
  })
}
