/** The client's body as a language model gets it. */
import { AdapterError, type BodyEdits, type Call, type EncoderResult, type MediaPart, type RequestBody } from '../adapter.ts'
import { codeOf } from '../http.ts'
import type { Encoded } from './encode.ts'
import { pinnedPart, type Pins } from './pins.ts'
import { pushedParams } from './received.ts'

/** Each encoded item under the name it has at its encoder: PD loads the features, or encodes where there are none. */
export function pinned (body: RequestBody, features: readonly EncoderResult[], pins: Pins, tenant: string | undefined): BodyEdits {
  const salt = pins.salt(body, tenant)
  const mediaParts = new Array<MediaPart | undefined>(body.media.length).fill(undefined)
  for (const { item, wire } of features) mediaParts[item] = pinnedPart((wire as Encoded).pin)
  if (features.length === 0) return salt
  const pushed = pushedParams(features)
  return pushed === undefined ? { ...salt, mediaParts } : { set: { ...salt.set, ec_transfer_params: JSON.stringify(pushed) }, mediaParts }
}

/** Sends the body with features in place of pixels, and with its pixels when the node lives and does not take these. Features that were pushed can not be sent for twice: the core begins anew. */
export async function rewrittenElseRaw<T> (rewritten: BodyEdits | undefined, raw: BodyEdits, pushed: boolean, call: Call, send: (edits: BodyEdits, rewritten: boolean) => Promise<T>): Promise<T> {
  if (rewritten === undefined) return await send(raw, false)
  try {
    return await send(rewritten, true)
  } catch (err) {
    if (pushed || !AdapterError.is(err) || err.code !== 'FEATURES_GONE') throw err
    call.log.warn({ err, node: err.node }, 'sending the request again with its pictures')
    return await send(raw, false)
  }
}

/** A server that breaks off may have read a file that was cut short, and would do so each time. Passes the call's outcome on. */
export async function watchingFeatures<T> (features: readonly EncoderResult[], pins: Pins, answer: Promise<T>): Promise<T> {
  return await answer.catch((err: unknown) => {
    if (AdapterError.is(err) && err.code === 'UNAVAILABLE' && codeOf(err.cause) !== 'ECONNREFUSED') for (const { wire } of features) pins.retire((wire as Encoded).pin)
    throw err
  })
}
