import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { freePort } from './free-port.ts'
import { systemProgram } from './system-program.ts'
import { until } from './until.ts'

const PLACES = ['/usr/bin/redis-server', '/usr/bin/valkey-server', '/usr/local/bin/redis-server', '/usr/local/bin/valkey-server']

export interface RedisServer {
  readonly url: string
  start (): Promise<void>
  stop (): Promise<void>
  /** It keeps its connections, and answers nothing. */
  freeze (on: boolean): void
}

/** A real Redis or Valkey: EPD_REDIS, one that is installed, or one from the system's packages when this is root on Debian. */
export async function startRedis (t: Test): Promise<RedisServer> {
  const file = systemProgram('EPD_REDIS', PLACES, ['redis-server'])
  if (file === undefined) throw new Error('no Redis here: install redis-server or valkey-server, or name one in EPD_REDIS')
  const port = await freePort()
  const folder = mkdtempSync(join(tmpdir(), 'epd-redis-'))
  let child: ChildProcess | undefined
  const server: RedisServer = {
    url: `redis://127.0.0.1:${port}`,
    async start () {
      child = spawn(file, ['--port', String(port), '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no', '--dir', folder], { stdio: 'ignore' })
      await until(async () => await answers(port), 'Redis answers', 60_000, 20)
    },
    async stop () {
      if (child === undefined || child.exitCode !== null || child.signalCode !== null) return
      const ended = once(child, 'exit')
      child.kill('SIGKILL')
      await ended
    },
    freeze (on) { child?.kill(on ? 'SIGSTOP' : 'SIGCONT') }
  }
  t.teardown(async () => { await server.stop() })
  process.once('exit', () => { child?.kill('SIGKILL') })
  await server.start()
  return server
}

async function answers (port: number): Promise<boolean> {
  const socket = connect(port, '127.0.0.1')
  return await new Promise(resolve => {
    socket.once('error', () => { resolve(false) }).once('connect', () => { socket.write('PING\r\n') }).once('data', data => { resolve(String(data).startsWith('+PONG')) })
  }).finally(() => { socket.destroy() }) as boolean
}
