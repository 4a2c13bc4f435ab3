import { createHash, randomBytes } from 'node:crypto'
import { Buffer } from 'node:buffer'
import { parseBody } from '../../plugin/body/index.ts'
import { Peer } from './processes.ts'
import { median, table } from './report.ts'
import type { BenchContext } from './report.ts'

export const name = 'body'

interface Reading { stallMs: number, peak: number }

/** Scans, fingerprints and splices bodies with pictures, beside parsing and stringifying them; and reads a 10 MB body. */
export async function run (context: BenchContext): Promise<string> {
  return [
    '## Request bodies',
    '',
    '### CPU per request with pictures of 1 MiB as data URLs',
    '',
    await splicing(context),
    '',
    '"Parse" is the work of a gateway that handles objects: JSON.parse, sha-256 of the decoded pictures, replacement of URLs, JSON.stringify.',
    '',
    '### Reading and scanning a body of 10 MB',
    '',
    await reading(context),
    '',
    'A fresh process for each request. Stall: the longest time the event loop was blocked. Peak: resident memory above idle, as a multiple of the body.'
  ].join('\n')
}

async function splicing (context: BenchContext): Promise<string> {
  const rows: Array<Array<string | number>> = []
  for (const pictures of [1, 4]) {
    const body = bodyWith(pictures)
    const ways = { bytes: async () => await spliced(body), parse: async () => { parsed(body) } }
    const times: Record<keyof typeof ways, number[]> = { bytes: [], parse: [] }
    for (let round = -1; round < context.rounds; round++) {
      for (const way of ['bytes', 'parse'] as const) {
        const ms = await cpuOf(ways[way], (context.quick ? 20 : 60) / pictures)
        if (round >= 0) times[way].push(ms)
      }
    }
    rows.push([`${pictures} x 1 MiB`, median(times.bytes), median(times.parse), `${(median(times.bytes) / median(times.parse)).toFixed(2)}x`])
  }
  return table(['body', 'this package: scan, fingerprint, splice, ms', 'parse, hash, stringify, ms', 'ratio'], rows)
}

async function cpuOf (work: () => Promise<unknown>, count: number): Promise<number> {
  const start = process.cpuUsage()
  for (let i = 0; i < count; i++) await work()
  const { user, system } = process.cpuUsage(start)
  return (user + system) / 1000 / count
}

function bodyWith (pictures: number): Buffer {
  const part = (): unknown => ({ type: 'image_url', image_url: { url: `data:image/jpeg;base64,${randomBytes(1 << 20).toString('base64')}` } })
  return Buffer.from(JSON.stringify({ model: 'm', messages: [{ role: 'user', content: [{ type: 'text', text: 'What is "this"?' }, ...Array.from({ length: pictures }, part)] }] }))
}

async function spliced (bytes: Buffer): Promise<Buffer[]> {
  const body = await parseBody(bytes)
  return body.splice({ set: { encoder_result: '[]' }, mediaUrls: body.media.map(item => `epd:${item.index}`) })
}

function parsed (bytes: Buffer): string {
  const body = JSON.parse(bytes.toString()) as { messages: Array<{ content: Array<{ image_url?: { url: string } }> }>, encoder_result?: unknown }
  for (const { image_url: image } of body.messages[0]!.content) {
    if (image === undefined) continue
    const picture = Buffer.from(image.url.slice(image.url.indexOf(',') + 1), 'base64')
    image.url = `epd:${createHash('sha256').update(picture).digest('hex')}`
  }
  body.encoder_result = []
  return JSON.stringify(body)
}

async function reading (context: BenchContext): Promise<string> {
  const ways = { 'this package, content-length': ['bytes', 'length'], 'this package, chunked': ['bytes', 'chunked'], "Fastify's own parser": ['fastify', 'length'] } as const
  const rows: Array<Array<string | number>> = []
  for (const [label, [reader, framing]] of Object.entries(ways)) {
    const stalls: number[] = []
    const peaks: number[] = []
    for (let round = 0; round < context.rounds; round++) {
      const peer = new Peer(new URL('./body-reader.js', import.meta.url), [reader], 0)
      try {
        const { stallMs, peak } = await peer.call<Reading>('read', framing)
        stalls.push(stallMs)
        peaks.push(peak)
      } finally {
        peer.close()
      }
    }
    rows.push([label, median(stalls), `${median(peaks).toFixed(2)}x`])
  }
  return table(['', 'longest stall, ms', 'peak memory'], rows)
}
