import { join } from 'node:path'
import type { Browser, Page } from 'playwright-core'
import { TraceStore } from '../../plugin/index.ts'
import type { CliServer } from '../helper/cli.ts'
import { packageRoot } from '../helper/package-root.ts'
import { until } from '../helper/until.ts'

/** Screenshots are kept beside the build, for people to look at. */
export const SHOTS = join(packageRoot(), '.tap', 'screenshots')

/** Texts of the list, the axis and the bar at the top that run into one another: in the page, an expression. */
export const OVERLAPS = `[...document.querySelectorAll('#requests [role=option], .columns, .axis, .bar, #detail summary')].flatMap(row => {
  const boxes = [...row.querySelectorAll('time, span, b, h1, p, button')].filter(one => one.children.length === 0 && one.textContent.trim() !== '').map(one => {
    const range = document.createRange()
    range.selectNodeContents(one)
    const text = range.getBoundingClientRect()
    const own = one.getBoundingClientRect()
    const clipped = getComputedStyle(one).overflow !== 'visible'
    return { text: one.textContent, left: text.left, right: clipped ? Math.min(text.right, own.right) : text.right, top: text.top, bottom: text.bottom }
  }).filter(box => box.right > box.left)
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2).map(b => a.text + ' | ' + b.text))
})`

/** Cards that a link runs behind: in the page, an expression. */
export const BEHIND_CARDS = `[...document.querySelectorAll('.wire:not(.head)')].flatMap(wire => {
  const frame = document.querySelector('.map').getBoundingClientRect()
  const cards = [...document.querySelectorAll('.node')].map(node => [node.querySelector('b').textContent, node.getBoundingClientRect()])
  const length = wire.getTotalLength()
  const points = Array.from({ length: 200 }, (_, i) => wire.getPointAtLength(length * (i + 0.5) / 200)).map(({ x, y }) => [x + frame.left, y + frame.top])
  return cards.filter(([, card]) => points.some(([x, y]) => x > card.left + 1 && x < card.right - 1 && y > card.top + 1 && y < card.bottom - 1)).map(([name]) => name)
})`

/** What axe finds: in the page, an expression. */
export function barriers (source: string): string {
  return `(async () => {
    ${source}
    const { violations } = await axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice'], resultTypes: ['violations'] })
    return violations.map(({ id, nodes }) => [id, ...nodes.map(({ html, failureSummary }) => html + ' ' + failureSummary)])
  })()`
}

/** With one trace, all of whose ids are of this digit. */
export function storeOf (digit: number): TraceStore {
  const store = new TraceStore()
  const seconds = Math.floor(Date.now() / 1e3)
  store.add({ traceId: String(digit).repeat(32), spanId: String(digit).repeat(16), parentSpanId: undefined, name: 'chat vlm', kind: 'client', startTime: [seconds, 0], endTime: [seconds, 1e6], attributes: { 'gen_ai.operation.name': 'chat' }, status: 'unset', service: 's' })
  return store
}

export async function shows (page: Page, trace: string | null): Promise<void> {
  await until(() => page.evaluate(`document.querySelector('#detail code')?.textContent === '${trace}'`), 'the page shows it')
}

/** Opens the page and notes what goes wrong in it: errors, blocked loads, requests to anywhere else. */
export async function open (browser: Browser, { url }: Pick<CliServer, 'url'>, { width, height, dark = false, hash = '', selected = true }: { width: number, height: number, dark?: boolean, hash?: string, selected?: boolean }): Promise<{ page: Page, problems: string[] }> {
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: dark ? 'dark' : 'light' })
  context.setDefaultTimeout(120_000)
  const page = await context.newPage()
  const problems: string[] = []
  page.on('pageerror', err => problems.push(err.message))
  page.on('console', message => { if (message.type() === 'error') problems.push(message.text()) })
  page.on('request', request => { if (!request.url().startsWith(url)) problems.push(request.url()) })
  await page.goto(`${url}/epd/${hash}`)
  if (selected) await page.waitForSelector('#requests [role=option][aria-selected=true]')
  return { page, problems }
}
