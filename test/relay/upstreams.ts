import { createServer } from 'node:net'
import type { AddressInfo, Socket } from 'node:net'
import { once } from 'node:events'
import type { Test } from 'tap'
import { Readable } from 'node:stream'
import { Agent } from 'undici'
import { send } from '../../adapters/http.ts'
import type { UpstreamResponse } from '../../adapters/adapter.ts'

export const SSE = { 'content-type': 'text/event-stream; charset=utf-8' }

/** An upstream response made by hand: these chunks, each in a turn of its own, then the end or a failure. */
export function scripted (chunks: readonly Buffer[], headers: Record<string, string | string[]>, failure?: Error, statusCode = 200): UpstreamResponse {
  let next = 0
  const body = new Readable({
    read () {
      setImmediate(() => {
        if (next < chunks.length) this.push(chunks[next++]!)
        else if (failure === undefined) this.push(null)
        else this.destroy(failure)
      })
    }
  })
  body.on('error', () => {})
  return { statusCode, headers, body }
}

export interface RawUpstream {
  /** Sends it a request and resolves at the head of its answer. */
  open (signal?: AbortSignal): Promise<UpstreamResponse>
  /** The socket of the last request, once its first bytes were there. */
  socket (): Promise<Socket>
}

/** A raw server on a real socket; `answer` writes what it likes. */
export async function rawUpstream (t: Test, answer: (socket: Socket) => void): Promise<RawUpstream> {
  const sockets: Socket[] = []
  const server = createServer(socket => {
    sockets.push(socket)
    socket.on('error', () => {})
    socket.once('data', () => { answer(socket) })
  })
  const dispatcher = new Agent()
  t.teardown(async () => {
    for (const socket of sockets) socket.destroy()
    server.close()
    await dispatcher.destroy()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const nothing = (): void => {}
  const log = { debug: nothing, info: nothing, warn: nothing, error: nothing }
  return {
    open: async (signal = new AbortController().signal) =>
      await send({ id: url, url, role: 'hybrid' }, { method: 'GET', path: '/' }, { signal, headers: {}, dispatcher, log }),
    socket: async () => {
      if (sockets.length === 0) await once(server, 'connection')
      return sockets.at(-1)!
    }
  }
}

/** HTTP/1.1 chunk. */
export function frame (text: string | Buffer): Buffer {
  const bytes = Buffer.from(text as string)
  return Buffer.concat([Buffer.from(`${bytes.length.toString(16)}\r\n`), bytes, Buffer.from('\r\n')])
}

/** The bytes of HTTP/1.1 chunks, as latin1 text; what is wrong with them, when something is. */
export function unchunk (text: string): string {
  const parts: string[] = []
  for (let at = 0; ;) {
    const end = text.indexOf('\r\n', at)
    const length = Number.parseInt(text.slice(at, end), 16)
    if (length === 0) return text.slice(at) === '0\r\n\r\n' ? parts.join('') : `bad end: ${text.slice(at)}`
    parts.push(text.slice(end + 2, end + 2 + length))
    at = end + 4 + length
    if (text.slice(at - 2, at) !== '\r\n') return 'bad chunk'
  }
}

/** Bytes cut at these places. */
export function cut (bytes: Buffer, places: readonly number[]): Buffer[] {
  const sorted = [0, ...[...places].sort((a, b) => a - b), bytes.length]
  return sorted.slice(1).map((end, i) => bytes.subarray(sorted[i], end))
}

export function event (value: unknown, newline = '\n'): string {
  return `data: ${JSON.stringify(value)}${newline}${newline}`
}
