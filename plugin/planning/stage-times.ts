/** What stages have taken, as measured: by it `bypass: auto` learns which way to the first token is the shorter one. */
import type { MediaItem } from '../../adapters/adapter.ts'
import type { NodeSnapshot } from '../registry/types.ts'
import type { StageTimes } from './time-line.ts'
import type { Plan } from './types.ts'
import type { RequestView } from './view.ts'

/** One request in so many goes the other way, so that both stay measured. */
export const EXPLORE_EVERY = 32
/** Encoders find pictures that they have seen: they must be slower by so much before they are passed over. */
const MARGIN = 1.1

/** Vision tokens that the slowest of the encoders has before it, this request's included. */
export function workAtEncoders (order: Plan['order'], media: readonly MediaItem[]): number {
  const work = new Map<NodeSnapshot, number>()
  for (const { index, tokens } of media) {
    const encoder = order[index]![0]!
    work.set(encoder, (work.get(encoder) ?? encoder.load.tokens) + tokens)
  }
  return Math.max(...work.values())
}

/** Vision tokens before and of a request at a node that begins answers; what it generates beside slows it down. */
export function workAt ({ load }: NodeSnapshot, tokens: number): number {
  return (load.tokens + tokens) * (1 + (load.active ?? load.requests))
}

/** Is it this request's turn to go the other way? */
export function explores (times: StageTimes | undefined): boolean {
  return times !== undefined && times.begun % EXPLORE_EVERY === EXPLORE_EVERY - 1
}

/** Are both ways measured, so that what was set before counts no longer? */
export function isMeasured ({ encode, fed, own }: StageTimes): boolean {
  return [encode, fed, own].every(line => line.at(1) !== undefined)
}

/**
 * Should `node` encode by itself, although encoders could?
 *
 * @param usually what it does when nothing is known
 * @returns the reason, if there is one to be named
 */
export function bypassByTimes ({ media, times }: RequestView, order: Plan['order'], node: NodeSnapshot, usually: boolean): { readonly bypass: boolean, readonly reason: string } {
  const known = times?.(node.role)
  const tokens = media.reduce((sum, item) => sum + item.tokens, 0)
  const work = workAt(node, tokens)
  const encode = known?.encode.at(workAtEncoders(order, media))
  const fed = known?.fed.at(work)
  const own = known?.own.at(work)
  const measured = encode !== undefined && fed !== undefined && own !== undefined
  const bypass = measured ? encode + fed > MARGIN * own : usually
  if (explores(known)) return { bypass: !bypass, reason: 'to measure' }
  return { bypass, reason: measured && bypass ? `encoders are slower, as measured: ${Math.round(encode + fed)} ms against ${Math.round(own)} ms` : '' }
}
