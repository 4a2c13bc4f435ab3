/** A model server without a model, cheap enough not to be what is measured: raw sockets, prepared bytes. */
import { createServer } from 'node:net'
import type { AddressInfo, Socket } from 'node:net'
import { once } from 'node:events'
import { serve } from './processes.ts'

const TEXT = 'x'.repeat(700)
const ANSWER = JSON.stringify({
  id: 'chatcmpl-1',
  object: 'chat.completion',
  created: 1,
  model: 'm',
  choices: [{ index: 0, message: { role: 'assistant', content: TEXT }, finish_reason: 'stop' }],
  usage: { prompt_tokens: 10, completion_tokens: 200, total_tokens: 210 }
})
const JSON_RESPONSE = Buffer.from(`HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ${ANSWER.length}\r\n\r\n${ANSWER}`)

const MODELS = JSON.stringify({ object: 'list', data: [{ id: 'm', object: 'model' }] })
const PROBE_RESPONSE = Buffer.from(`HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ${MODELS.length}\r\n\r\n${MODELS}`)

const EVENT = `data: ${JSON.stringify({ id: 'chatcmpl-1', object: 'chat.completion.chunk', created: 1, model: 'm', choices: [{ index: 0, delta: { content: ' token' }, finish_reason: null }] })}\n\n`
const frame = (text: string): string => `${Buffer.byteLength(text).toString(16)}\r\n${text}\r\n`
const STREAM_HEAD = 'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n'
const FIRST = Buffer.from(STREAM_HEAD + frame(EVENT))
const CHUNK = Buffer.from(frame(EVENT))
const LAST = Buffer.from(frame('data: [DONE]\n\n') + '0\r\n\r\n')

let chunks = 50
let interval = 20

const server = createServer({ noDelay: true }, socket => {
  let left = 0
  let kind: Buffer | undefined = JSON_RESPONSE
  let partial: Buffer | undefined
  socket.on('error', () => {})
  socket.on('data', data => {
    if (left === 0) {
      const bytes = partial === undefined ? data : Buffer.concat([partial, data])
      const end = bytes.indexOf('\r\n\r\n')
      partial = end === -1 ? bytes : undefined
      if (end === -1) return
      const head = bytes.toString('latin1', 0, end)
      left = Number(/content-length: (\d+)/i.exec(head)?.[1] ?? 0)
      kind = head.startsWith('GET') ? PROBE_RESPONSE : bytes.includes('"stream":true', end) ? undefined : JSON_RESPONSE
      left -= bytes.length - end - 4
    } else left -= data.length
    if (left > 0) return
    left = 0
    if (kind === undefined) stream(socket)
    else socket.write(kind)
  })
})

function stream (socket: Socket): void {
  let sent = 1
  socket.write(FIRST)
  const timer = setInterval(() => {
    if (socket.destroyed) clearInterval(timer)
    else if (sent++ < chunks) socket.write(CHUNK)
    else {
      clearInterval(timer)
      socket.write(LAST)
    }
  }, interval)
}

server.listen(0, '127.0.0.1')
await once(server, 'listening')

serve({
  port: () => (server.address() as AddressInfo).port,
  pace: (count: number, ms: number) => {
    chunks = count
    interval = ms
  }
})
