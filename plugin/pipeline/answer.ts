import { isEventStream, UpstreamAnswer, type Completion } from '../../adapters/http.ts'
import { isFlowing } from '../../adapters/flow.ts'
import { AdapterError, type UpstreamResponse } from '../../adapters/adapter.ts'
import type { TimeLimit } from '../../adapters/abort.ts'
import { AnswerStream, type Answer } from './answer-stream.ts'
import { closingOf, UsageReader } from './usage.ts'

/**
 * Waits for the first bytes for the client, or the end of an empty body. Rejects with UNAVAILABLE when the node breaks
 * off before, with the limit's reason when that aborts.
 *
 * @param limit - the call's. Its time counts until the first byte, then `idle` does; its abort ends the answer
 * @param idle - longest silence between two chunks, in milliseconds
 * @param keepAlive - silence in an event stream after which a comment is sent; 0 for none
 */
export async function beginAnswer (node: string, upstream: UpstreamResponse, limit: TimeLimit, idle: number, keepAlive = 0): Promise<Answer> {
  const completion = upstream instanceof UpstreamAnswer ? upstream.takeCompletion() : undefined
  const whole = completion?.bytes ?? wholeBody(upstream)
  if (whole !== undefined) {
    limit.clear()
    return wholeAnswer(upstream, whole, completion)
  }
  const stream = new AnswerStream(upstream, limit, idle, keepAlive)
  try {
    await stream.begun
    return stream
  } catch (cause) {
    throw limit.aborted || AdapterError.is(cause) ? cause : new AdapterError('UNAVAILABLE', 'the answer broke off before it began', { node, cause })
  }
}

function wholeBody (upstream: UpstreamResponse): Buffer | undefined {
  if (isFlowing(upstream)) return undefined
  const { headers, body } = upstream
  if (isEventStream(headers) || body.readableLength === 0 || headers['content-length'] !== String(body.readableLength)) return undefined
  const bytes = body.read() as Buffer
  // Its end is yet to be read.
  body.resume()
  return bytes
}

function wholeAnswer ({ statusCode, headers }: UpstreamResponse, body: Buffer, completion: Completion | undefined): Answer {
  const usage = new UsageReader()
  if (completion === undefined) usage.add(body)
  return { statusCode, headers, body, delivered: Promise.resolve({ outcome: 'complete', statusCode, firstByteAt: performance.now(), bytes: body.length, closing: () => completion === undefined ? usage.read() : closingOf(completion.value) }) }
}
