import type { Dispatcher } from 'undici'
import type { AdapterNode, ByteSink, Call, Log, UpstreamResponse } from '../../adapters/adapter.ts'
import { createDispatcher } from '../../adapters/index.ts'
import { parseBody, type Body } from '../../plugin/body/index.ts'

export const silent: Log = { debug () {}, info () {}, warn () {}, error () {} }

/** A dispatcher that is destroyed with the test. */
export function dispatcherFor (t: { teardown: (run: () => Promise<void>) => void }): Dispatcher {
  const dispatcher = createDispatcher()
  t.teardown(async () => { await dispatcher.destroy() })
  return dispatcher
}

export function callWith (dispatcher: Dispatcher, more: Partial<Call> = {}): Call {
  return { signal: new AbortController().signal, headers: {}, dispatcher, log: silent, ...more }
}

export function nodeAt (url: string, more: Partial<AdapterNode> = {}): AdapterNode {
  return { id: url, url, role: 'hybrid', ...more }
}

export async function bodyFrom (value: object): Promise<Body> {
  return await parseBody(Buffer.from(JSON.stringify(value)))
}

/** Everything a response pipes, as text. */
export async function textOf (response: UpstreamResponse): Promise<string> {
  const chunks: Buffer[] = []
  const sink: ByteSink = { write: chunk => { chunks.push(chunk); return true }, onDrain: () => {} }
  await response.pipe(sink)
  return Buffer.concat(chunks).toString()
}
