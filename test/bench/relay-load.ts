/** A load generator on raw sockets: as many connections as asked for, each sends its next request when it has its answer. */
import { connect } from 'node:net'
import type { Socket } from 'node:net'
import { serve } from './processes.ts'

interface Load { port: number, path: string, connections: number, ms: number, body: string, headers?: string, perSecond?: number }
interface LoadResult { requests: number, failures: number, latencies: number[], elapsed: number }

const END = Buffer.from('\r\n0\r\n\r\n')

/** Calls `done` at the end of each response on this socket. */
function onResponse (socket: Socket, done: (ok: boolean) => void): void {
  let head = ''
  let left = -1
  let ok = false
  let last = Buffer.alloc(0)
  socket.on('data', data => {
    let body = data
    if (left === -1) {
      head += data.toString('latin1')
      const end = head.indexOf('\r\n\r\n')
      if (end === -1) return
      ok = head.startsWith('HTTP/1.1 200')
      const length = /content-length: (\d+)/i.exec(head)?.[1]
      body = Buffer.from(head.slice(end + 4), 'latin1')
      left = length === undefined ? Number.POSITIVE_INFINITY : Number(length)
      head = ''
      last = Buffer.alloc(0)
    }
    left -= body.length
    if (left === Number.POSITIVE_INFINITY) {
      last = Buffer.concat([last, body]).subarray(-END.length)
      if (last.equals(END)) left = 0
    }
    if (left > 0) return
    left = -1
    done(ok)
  })
}

async function run ({ port, path, connections, ms, body, headers = '', perSecond }: Load): Promise<LoadResult> {
  const request = Buffer.from(`POST ${path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n${headers}content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`)
  const result: LoadResult = { requests: 0, failures: 0, latencies: [], elapsed: 0 }
  const begun = performance.now()
  const until = begun + ms
  // Of each connection; without a pace it sends when it has its answer.
  const every = perSecond === undefined ? 0 : connections * 1000 / perSecond
  await Promise.all(Array.from({ length: connections }, (_, i) => new Promise<void>(resolve => {
    let sent = 0
    let ended = false
    const socket = connect({ port, host: '127.0.0.1', noDelay: true }, () => setTimeout(send, every === 0 ? i % 20 : i * every / connections))
    const send = (): void => {
      if (performance.now() >= until) {
        ended = true
        socket.destroy()
        return
      }
      sent = performance.now()
      socket.write(request)
    }
    socket.on('error', () => {})
    socket.on('close', () => {
      if (!ended) result.failures++
      resolve()
    })
    onResponse(socket, ok => {
      result.requests++
      if (!ok) result.failures++
      const took = performance.now() - sent
      result.latencies.push(took)
      if (every > took) setTimeout(send, every - took)
      else send()
    })
  })))
  result.elapsed = performance.now() - begun
  return result
}

serve({ run })
