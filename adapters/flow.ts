/**
 * The bytes of an answer on their way to a sink, without a stream of Node.js in between: one more stream takes 3 to 8 us of
 * CPU for a token (46 and 54 in all) and 1.2 KB for each that idles.
 */
import { Readable } from 'node:stream'
import type { UpstreamResponse } from './adapter.ts'

/** Takes an answer's bytes as they come. After `end` or `error` it gets nothing more. */
export interface Sink {
  data (chunk: Buffer): void
  end (): void
  /** The node broke off, or the call was ended. */
  error (error: Error): void
}

/** Bytes that come when their reader is ready. */
export interface Flow {
  /** What has come goes to the sink now, what comes later as it comes. */
  flow (sink: Sink): void
  /** The node waits with the rest until `resume`. */
  pause (): void
  resume (): void
  /** No more is wanted: ends the call, unless all has come. */
  close (error: Error | null): void
}

/** An answer of `http.ts`. Its `body` is another way to the same bytes: use one of them. */
export interface FlowingResponse extends UpstreamResponse, Flow {
  /** Nobody has asked for `body`. */
  readonly flowing: boolean
  /** Holds back what comes from now on, with `held` before it. */
  hold (held: Buffer): void
}

/** The bytes of a response, as directly as they are to be had. */
export function flowOf (response: UpstreamResponse): Flow {
  return isFlowing(response) ? response : flowOfStream(response.body)
}

export function isFlowing (response: UpstreamResponse): response is FlowingResponse {
  return (response as Partial<FlowingResponse>).flowing === true
}

function flowOfStream (body: Readable): Flow {
  return {
    flow: sink => {
      body.on('error', (error: Error) => { sink.error(error) })
      body.on('close', () => { if (!body.readableEnded && body.errored === null) sink.error(new Error('the node closed its answer')) })
      body.on('end', () => { sink.end() })
      body.on('data', (chunk: Buffer) => { sink.data(chunk) })
    },
    pause: () => { body.pause() },
    resume: () => { body.resume() },
    close: () => { body.destroy() }
  }
}

/** The bytes as a stream of Node.js. */
export function readableOf (response: FlowingResponse): Readable {
  const body = new Readable({
    highWaterMark: 64 * 1024,
    read: () => { response.resume() },
    destroy: (error, done) => {
      response.close(error)
      done(error)
    }
  })
  // It may break off before its reader listens, and an error without a listener would end the process.
  body.on('error', () => {})
  response.flow({
    data: chunk => { if (!body.push(chunk)) response.pause() },
    end: () => { body.push(null) },
    error: error => { body.destroy(error) }
  })
  return body
}
