import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { packageRoot } from '../helper/package-root.ts'

export interface Load {
  /** Requests sent so far, and their client-side outcomes. */
  readonly sent: number
  stop (): Promise<void>
}

const QUESTIONS = ['How many red circles are there?', 'What shapes are there?', 'How many blue squares are there?']

/** The sample pictures as data URLs. */
export async function samplePictures (): Promise<string[]> {
  const files = [['shapes.png', 'png'], ['shapes-2.jpg', 'jpeg'], ['shapes-3.webp', 'webp']] as const
  return await Promise.all(files.map(async ([name, type]) => `data:image/${type};base64,${(await readFile(join(packageRoot(), 'docs', 'examples', name))).toString('base64')}`))
}

/** A chat request about so many of the pictures, the n-th of a load. */
export function question (pictures: readonly string[], n: number, count: number): object {
  const content = [...Array.from({ length: count }, (_, i) => ({ type: 'image_url', image_url: { url: pictures[(n + i) % pictures.length] } })), { type: 'text', text: QUESTIONS[n % QUESTIONS.length] }]
  const stream = n % 2 === 0 ? { stream: true, stream_options: { include_usage: true } } : {}
  return { model: 'tiny-internvl', temperature: 0, max_tokens: 12, ...stream, messages: [{ role: 'user', content }] }
}

/** Milliseconds between two requests, after the first few: the page shows a load, and the machine is left for the test. */
const PACE_MS = 250
const FIRST = 12

/** Sends a request, one after the other, with no, one and two pictures, until it is stopped. */
export async function startLoad (url: string): Promise<Load> {
  const pictures = await samplePictures()
  let sent = 0
  const stopping = new AbortController()
  const running = (async () => {
    while (!stopping.signal.aborted) {
      const body = JSON.stringify(question(pictures, sent, sent % 4 === 3 ? 0 : 1 + sent % 2))
      sent++
      const answer = await fetch(`${url}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body })
      await answer.arrayBuffer()
      if (sent > FIRST) await delay(PACE_MS)
    }
  })()
  running.catch(() => {})
  return {
    get sent () { return sent },
    async stop () {
      stopping.abort()
      await running
    }
  }
}
