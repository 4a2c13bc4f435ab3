import { Agent, type Dispatcher } from 'undici'
import type { AdapterNode, Call, Log, UpstreamResponse } from '../../adapters/adapter.ts'
import { parseBody, type Body } from '../../plugin/body/index.ts'

export const silent: Log = { debug () {}, info () {}, warn () {}, error () {} }

/** A dispatcher that is destroyed with the test. */
export function dispatcherFor (t: { teardown: (run: () => Promise<void>) => void }): Dispatcher {
  const dispatcher = new Agent({ keepAliveTimeout: 2500 })
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

/** The whole body of a response. */
export async function bytesOf ({ body }: UpstreamResponse): Promise<Buffer> {
  const chunks: Buffer[] = []
  for await (const chunk of body as AsyncIterable<Buffer>) chunks.push(chunk)
  return Buffer.concat(chunks)
}

/** The whole body of a response, as text. */
export async function textOf (response: UpstreamResponse): Promise<string> {
  return (await bytesOf(response)).toString()
}
