import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import type { Browser } from 'playwright-core'
import t from 'tap'
import { openBrowser } from '../helper/chromium.ts'
import { until } from '../helper/until.ts'
import { open, OVERLAPS, SHOTS, shows } from './browse.ts'
import { failingScene } from './scenes.ts'

const SIZE = { width: 1280, height: 860 }

t.setTimeout(120_000)
const opened = await openBrowser()
if ('missing' in opened) t.plan(0, opened.missing)
else await suite(opened)

async function suite (browser: Browser): Promise<void> {
  t.teardown(() => browser.close())
  await mkdir(SHOTS, { recursive: true })

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
    await page.screenshot({ path: join(SHOTS, 'error-1280.png'), fullPage: true })

    await page.locator('#requests [data-status=ok]', { has: page.locator('.reason') }).click()
    await until(async () => await page.locator('.failure[data-status=ok]').count() === 1, 'what failed on the way is shown')
    t.match(await page.locator('.failure').textContent(), /1 call failed on the way.*attempt 1encode on E\dfailed after .*Then encode on E\d, decode on PD\d answered\.$/)

    await page.setViewportSize({ width: 390, height: 844 })
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 390)
    t.strictSame(problems, [])
    await page.context().close()
  })
}
