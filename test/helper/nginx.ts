import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { freePort } from './free-port.ts'
import { packageRoot } from './package-root.ts'
import { systemProgram } from './system-program.ts'
import { until } from './until.ts'

const PLACES = ['/usr/sbin/nginx', '/usr/local/sbin/nginx', '/usr/bin/nginx', '/opt/homebrew/bin/nginx']

/** A real nginx with deploy/nginx.conf, in front of gateways at these ports. Resolves with its URL. */
export async function startNginx (t: Test, gateways: readonly [number, number]): Promise<string> {
  const file = systemProgram('EPD_NGINX', PLACES, ['nginx-light'])
  if (file === undefined) throw new Error('no nginx here: install one, or name it in EPD_NGINX')
  const folder = mkdtempSync(join(tmpdir(), 'epd-nginx-'))
  const port = await freePort()
  const text = readFileSync(join(packageRoot(), 'deploy', 'nginx.conf'), 'utf8')
    .replace('10.0.0.10:8000', `127.0.0.1:${gateways[0]}`).replace('10.0.0.11:8000', `127.0.0.1:${gateways[1]}`)
    .replace('listen 8080', `listen 127.0.0.1:${port}`).replace('worker_processes auto', 'worker_processes 1')
    .replace('http {', `http {\n${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(name => `  ${name}_temp_path ${folder}/${name};`).join('\n')}`)
  const config = join(folder, 'nginx.conf')
  writeFileSync(config, text)
  const child = spawn(file, ['-p', folder, '-c', config, '-e', join(folder, 'error.log'), '-g', `daemon off; pid ${folder}/nginx.pid;`], { stdio: 'ignore' })
  process.once('exit', () => { child.kill('SIGKILL') })
  t.teardown(async () => {
    const ended = once(child, 'exit')
    child.kill('SIGTERM')
    await ended
  })
  const url = `http://127.0.0.1:${port}`
  await until(async () => await fetch(`${url}/livez`).then(answer => answer.ok, () => false), 'nginx answers', 60_000, 50)
  return url
}
