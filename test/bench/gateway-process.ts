/** `fastify-epd serve` with embedded engines, as a user starts it. */
import { spawn, type ChildProcess } from 'node:child_process'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import type { EpdOptions } from '../../plugin/index.ts'

const MAIN = fileURLToPath(new URL('../../plugin/cli/main.js', import.meta.url))

export interface GatewayProcess { readonly process: ChildProcess, readonly url: string }

/** @param title names it in errors and its configuration file in `folder` @returns when its engines answer */
export async function startGateway (folder: string, title: string, options: EpdOptions): Promise<GatewayProcess> {
  const config = join(folder, `${title.replaceAll(/\W+/g, '-')}.json`)
  await writeFile(config, JSON.stringify(options))
  const child = spawn(process.execPath, [MAIN, 'serve', '--config', config, '--port', '0', '--log-level', 'error'], { stdio: ['ignore', 'pipe', 'inherit'] })
  const url = await new Promise<string>((resolve, reject) => {
    createInterface({ input: child.stdout }).on('line', line => {
      const found = /^listening on (\S+)$/.exec(line)
      if (found !== null) resolve(found[1]!)
    })
    child.once('exit', code => { reject(new Error(`the gateway of ${title} ended with ${code}`)) })
  })
  return { process: child, url }
}

export async function stopGateway ({ process: child }: GatewayProcess): Promise<void> {
  if (child.exitCode !== null) return
  const exited = new Promise(resolve => child.once('exit', resolve))
  child.kill('SIGTERM')
  await exited
}
