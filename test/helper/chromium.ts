import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { chromium, type Browser } from 'playwright-core'

/** What drives pages and draws no windows: a page costs a third of the CPU time that it costs in a whole Chromium. */
const SHELL = 'chromium-headless-shell'
const PLACES = [`/usr/bin/${SHELL}`, '/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome', '/usr/bin/google-chrome-stable', '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome']

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

/** Test files that run at the same time wait for one another: apt-get refuses to run twice. */
function install (): string | { readonly missing: string } {
  if (process.getuid?.() !== 0 || !existsSync('/usr/bin/apt-get')) return { missing: 'no Chromium here: install one, or name it in EPD_CHROMIUM' }
  const get = 'apt-get install -y --no-install-recommends'
  const script = `command -v ${SHELL} || command -v chromium || { apt-get update; ${get} ${SHELL} || ${get} chromium; }`
  spawnSync('flock', [join(tmpdir(), 'fastify-epd-chromium.lock'), 'sh', '-c', script], { stdio: 'ignore', timeout: 100_000, env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' } })
  return find() ?? { missing: 'no Chromium here, and apt-get could not install one' }
}
