/** HTTP over a bare socket: what a server really sends, byte for byte, and when it closes. */
import { connect } from 'node:net'

/** What a test sends, and the server's whole answer as it came. */
export interface Exchange {
  readonly request: { readonly method: string, readonly path: string, readonly body?: unknown }
  /** Status line and headers, each with its line end; then the body with its chunk sizes. Latin-1, so that a byte is a character. */
  readonly head: string
  readonly body: string
  /** What became of the connection: milliseconds after the last byte at which the server closed it; null when it stayed open as long as we watched. */
  readonly closedAfterMs: number | null
}

export interface Sent {
  readonly method?: string
  readonly path: string
  readonly body?: unknown
  /** How long to watch the connection after the answer. */
  readonly watchMs?: number
  readonly headers?: Readonly<Record<string, string>>
}

const HEAD_END = '\r\n\r\n'

/** Sends one request on a connection of its own. Rejects when the connection fails before an answer. */
export function exchange (url: string, { method, path, body, watchMs = 50, headers = {} }: Sent): Promise<Exchange> {
  const { hostname, port } = new URL(url)
  const text = body === undefined ? '' : JSON.stringify(body)
  const verb = method ?? (body === undefined ? 'GET' : 'POST')
  const lines = [`${verb} ${path} HTTP/1.1`, `host: ${hostname}:${port}`, ...Object.entries(headers).map(([name, value]) => `${name}: ${value}`)]
  if (body !== undefined) lines.push('content-type: application/json', `content-length: ${Buffer.byteLength(text)}`)
  return new Promise((resolve, reject) => {
    const socket = connect({ host: hostname, port: Number(port) })
    let got = ''
    let last = 0
    let watching: NodeJS.Timeout | undefined
    const done = (closedAfterMs: number | null): void => {
      clearTimeout(watching)
      socket.destroy()
      const end = got.indexOf(HEAD_END) + HEAD_END.length
      resolve({
        request: { method: verb, path, ...(body === undefined ? {} : { body }) },
        head: got.slice(0, end),
        body: got.slice(end),
        closedAfterMs
      })
    }
    socket.setEncoding('latin1')
    socket.on('connect', () => { socket.write(lines.join('\r\n') + HEAD_END + text) })
    socket.on('data', (bytes: string) => {
      got += bytes
      last = performance.now()
      if (isWhole(got)) watching ??= setTimeout(() => { done(null) }, watchMs)
    })
    socket.on('error', error => { if (isWhole(got)) done(Math.round(performance.now() - last)); else reject(error) })
    socket.on('close', () => { if (got === '') reject(new Error(`${url} closed the connection without an answer`)); else done(Math.round(performance.now() - last)) })
  })
}

function isWhole (answer: string): boolean {
  const end = answer.indexOf(HEAD_END)
  if (end < 0) return false
  const length = /\r\ncontent-length: (\d+)/i.exec(answer.slice(0, end))?.[1]
  return length === undefined ? answer.endsWith('\r\n0\r\n\r\n') || answer.slice(end) === HEAD_END + '0' + HEAD_END : answer.length >= end + HEAD_END.length + Number(length)
}

/** The JSON of a recorded or fresh answer, chunks joined. */
export function jsonOf ({ head, body }: Pick<Exchange, 'head' | 'body'>): Record<string, unknown> {
  return JSON.parse(Buffer.from(plainBody(head, body), 'latin1').toString()) as Record<string, unknown>
}

/** The body without chunk sizes. */
export function plainBody (head: string, body: string): string {
  if (!/\r\ntransfer-encoding: chunked/i.test(head)) return body
  let rest = body
  let joined = ''
  for (;;) {
    const [size] = /^[0-9a-f]+/i.exec(rest)!
    const length = Number.parseInt(size, 16)
    if (length === 0) return joined
    const start = size.length + 2
    joined += rest.slice(start, start + length)
    rest = rest.slice(start + length + 2)
  }
}

export function statusOf ({ head }: Pick<Exchange, 'head'>): number {
  return Number(head.split(' ')[1])
}
