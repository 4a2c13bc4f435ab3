import { chromium, type Browser } from 'playwright-core'
import { systemProgram } from './system-program.ts'

/** What drives pages and draws no windows: a page costs a third of the CPU time that it costs in a whole Chromium. */
const SHELL = 'chromium-headless-shell'
const PLACES = [`/usr/bin/${SHELL}`, '/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome', '/usr/bin/google-chrome-stable', '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome']

/** A headless Chromium: EPD_CHROMIUM, one that is installed, or one from the system's packages when this is root on Debian. */
export async function openBrowser (): Promise<Browser | { readonly missing: string }> {
  const file = systemProgram('EPD_CHROMIUM', PLACES, [SHELL, 'chromium'])
  if (file === undefined) return { missing: 'no Chromium here: install one, or name it in EPD_CHROMIUM' }
  return await chromium.launch({ executablePath: file, args: ['--no-sandbox', '--disable-dev-shm-usage'] })
}
