/** What stands between the load and the vLLM servers of an arrangement. */
import { spawn, type ChildProcess } from 'node:child_process'
import { closeSync, openSync } from 'node:fs'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { startCli, type Ending } from '../helper/cli.ts'
import { freePort } from '../helper/free-port.ts'
import { until } from '../helper/until.ts'

/** A vLLM server; a hybrid encodes, prefills and decodes, or, beside an encoder, only the latter two. */
export interface Backend { readonly url: string, readonly role: 'encoder' | 'prefill' | 'decode' | 'hybrid' }
export interface Gateway { readonly name: string, readonly options: object }
export interface Front { readonly name: string, readonly url: string }
interface Place { readonly out: string, readonly name: string }

/** This gateway with some options, which knows all the servers when it is returned. */
export async function gateway (t: Ending, backends: readonly Backend[], options: Gateway, { out, name }: Place): Promise<Front> {
  const config = join(out, `${name}.${options.name}.config.json`)
  await writeFile(config, JSON.stringify({ embedded: false, ...options.options, nodes: backends.map(({ url, role }) => ({ url, role, adapter: 'vllm' })) }))
  const { url } = await startCli(t, ['serve', '--config', config, '--port', '0', '--log-level', 'warn'])
  await until(async () => {
    const nodes = Object.values(await (await fetch(`${url}/nodes/status`)).json() as Record<string, { health: string }>)
    return nodes.length === backends.length && nodes.every(({ health }) => health === 'healthy')
  }, 'the gateway knows all servers', 60_000)
  return { name: options.name, url }
}

/** nginx, with its round robin, in front of servers that do all. */
export async function nginx (t: Ending, binary: string, backends: readonly Backend[], { out, name }: Place): Promise<Front> {
  const port = await freePort()
  const folder = join(out, `${name}-nginx`)
  await mkdir(folder, { recursive: true })
  const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(kind => `${kind}_temp_path ${folder}/${kind};`).join(' ')
  await writeFile(join(folder, 'nginx.conf'), `
daemon off; worker_processes 4; pid ${folder}/pid; error_log stderr warn;
events { worker_connections 4096; }
http {
  access_log off; client_max_body_size 512m; client_body_buffer_size 32m; ${temporary}
  upstream servers { ${backends.map(({ url }) => `server ${new URL(url).host};`).join(' ')} keepalive 256; }
  server {
    listen 127.0.0.1:${port};
    location / { proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 600s; }
  }
}
`)
  return await started(t, 'nginx', [binary, '-p', folder, '-e', 'stderr', '-c', join(folder, 'nginx.conf')], port, join(out, `${name}-nginx.log`))
}

/** vLLM's own example `disagg_epd_proxy.py`, in front of E and PD, or E, P and D. */
export async function proxy (t: Ending, command: readonly string[], backends: readonly Backend[], { out, name }: Place): Promise<Front> {
  const port = await freePort()
  const urls = (...roles: ReadonlyArray<Backend['role']>): string => backends.filter(({ role }) => roles.includes(role)).map(({ url }) => url).join(',')
  const prefill = urls('prefill')
  const flags = ['--host', '127.0.0.1', '--port', String(port), '--encode-servers-urls', urls('encoder'), '--prefill-servers-urls', prefill === '' ? 'disable' : prefill, '--decode-servers-urls', urls('hybrid', 'decode')]
  return await started(t, 'vLLM proxy', [...command, ...flags], port, join(out, `${name}-proxy.log`))
}

async function started (t: Ending, name: string, [file, ...args]: string[], port: number, log: string): Promise<Front> {
  const fd = openSync(log, 'w')
  const child: ChildProcess = spawn(file!, args, { stdio: ['ignore', fd, fd] })
  closeSync(fd)
  let problem: string | undefined
  child.once('error', error => { problem = error.message })
  child.once('exit', () => { problem ??= 'it ended' })
  t.teardown(async () => {
    child.kill('SIGTERM')
    for (let i = 0; i < 50 && child.exitCode === null && child.signalCode === null; i++) await delay(100)
    child.kill('SIGKILL')
  })
  const url = `http://127.0.0.1:${port}`
  await until(async () => {
    if (problem !== undefined) throw new Error(`${name}: ${problem}; see ${log}`)
    return await fetch(`${url}/v1/models`, { signal: AbortSignal.timeout(5_000) }).then(answer => answer.ok, () => false)
  }, `${name} answers`, 60_000, 200)
  return { name, url }
}
