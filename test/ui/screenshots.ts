/** `npm run screenshots [FOLDER]`: pictures of the page in each of its states, narrow and wide, light and dark, for people to judge. */
import { mkdir } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import sharp from 'sharp'
import type { Browser } from 'playwright-core'
import { openBrowser } from '../helper/chromium.ts'
import { open, SHOTS } from './browse.ts'
import { comparedScene, failingScene, manyScene, nodeScene, normalScene } from './scenes.ts'

const SCENES = { normal: (t: Parameters<typeof normalScene>[0]) => normalScene(t, 100), error: failingScene, node: nodeScene, comparison: comparedScene, many: manyScene }
const WIDTHS = [1280, 390] as const

const [folder = SHOTS, ...names] = process.argv.slice(2)
const ends: Array<() => unknown> = []
const scope = { teardown: (end: () => unknown) => { ends.unshift(end) } }

const browser = await openBrowser()
if ('missing' in browser) throw new Error(browser.missing)
try {
  await mkdir(folder, { recursive: true })
  for (const [name, scene] of Object.entries(SCENES)) {
    if (names.length > 0 && !names.includes(name)) continue
    const { url, hash = '' } = await scene(scope)
    for (const width of WIDTHS) for (const dark of [false, true]) await shoot(browser, `${url}/epd/${hash}`, join(resolve(folder), `${name}-${width}-${dark ? 'dark' : 'light'}.png`), width, dark)
  }
} finally {
  await browser.close()
  for (const end of ends) await end()
}

async function shoot (browser: Browser, address: string, path: string, width: number, dark: boolean): Promise<void> {
  const { page } = await open(browser, { url: new URL(address).origin }, { width, height: 860, dark, hash: new URL(address).hash })
  await page.waitForLoadState('load')
  // The page asks for its charts and pictures.
  await page.waitForSelector('.stage')
  // A node need not say how full it is.
  await page.waitForSelector('.gauges:not(:empty)', { timeout: 5_000 }).catch(() => {})
  await page.evaluate('Promise.all([...document.images].map(image => image.decode().catch(() => {})))')
  // A dialog covers what is on the screen.
  const picture = await page.screenshot({ fullPage: !await page.locator('dialog').isVisible() })
  // A quarter of the size, for the documentation.
  await sharp(picture).png({ palette: true, effort: 10 }).toFile(path)
  process.stdout.write(`${path}\n`)
  await page.context().close()
}
