/** Measures what the stages of requests with media take. */
import type { RequestBody } from '../../adapters/adapter.ts'
import { ownTokens, TimeLine, visionTokens, workAt, workAtEncoders, type Plan, type StageTimes } from '../planning/index.ts'

/** The stages of one attempt. Called in their order; a stage that fails is not measured. */
export interface Timing {
  /** The features are there. */
  encoded (): void
  /** The first token is, or P's answer. */
  begun (): void
}

/** What is known of each model's stages, by the role of the nodes that begin its answers. */
export class Timings {
  readonly #known = new Map<string, StageTimes>()

  of (model: string, role: string): StageTimes | undefined {
    return this.#known.get(`${role} ${model}`)
  }

  /** An attempt begins, and has not been counted at its nodes. Undefined when it says nothing of either way: both encode. */
  begin (plan: Plan, body: RequestBody): Timing | undefined {
    const node = plan.prefill ?? plan.node
    const times = this.#timesOf(body.model, node.role)
    times.begun++
    const [tokens, own] = [visionTokens(body), ownTokens(plan, body)]
    if (plan.callsEncoders || (plan.order.length > 0 && own > 0)) return undefined
    const fed = plan.order.length > 0
    const encoding = fed ? workAtEncoders(plan.order, body.media) : 0
    const work = workAt(node, tokens)
    let since = performance.now()
    let stage: TimeLine | undefined = fed ? undefined : times.own
    return {
      encoded: () => {
        const now = performance.now()
        times.encode.add(encoding, now - since)
        since = now
        stage = times.fed
      },
      begun: () => {
        stage?.add(work, performance.now() - since)
        stage = undefined
      }
    }
  }

  /** For models that a node has: a bounded number. */
  #timesOf (model: string, role: string): StageTimes {
    const name = `${role} ${model}`
    let times = this.#known.get(name)
    if (times === undefined) this.#known.set(name, times = { encode: new TimeLine(), fed: new TimeLine(), own: new TimeLine(), begun: 0 })
    return times
  }
}
