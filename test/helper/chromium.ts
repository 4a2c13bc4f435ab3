import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { chromium, type Browser } from 'playwright-core'

const PLACES = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome', '/usr/bin/google-chrome-stable', '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome']

/** A headless Chromium: EPD_CHROMIUM, one that is installed, or one from the system's packages when this is root on Debian. */
export async function openBrowser (): Promise<Browser | { readonly missing: string }> {
  const found = find() ?? install()
  if (typeof found === 'object') return found
  return await chromium.launch({ executablePath: found, args: ['--no-sandbox', '--disable-dev-shm-usage'] })
}

function find (): string | undefined {
  const { EPD_CHROMIUM } = process.env
  return [...EPD_CHROMIUM === undefined ? [] : [EPD_CHROMIUM], ...PLACES].find(path => existsSync(path))
}

function install (): string | { readonly missing: string } {
  if (process.getuid?.() !== 0 || !existsSync('/usr/bin/apt-get')) return { missing: 'no Chromium here: install one, or name it in EPD_CHROMIUM' }
  const options = { stdio: 'ignore', timeout: 100_000, env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' } } as const
  spawnSync('apt-get', ['update'], options)
  spawnSync('apt-get', ['install', '-y', '--no-install-recommends', 'chromium'], options)
  return find() ?? { missing: 'no Chromium here, and apt-get could not install one' }
}
