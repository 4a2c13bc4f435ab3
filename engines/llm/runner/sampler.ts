/** Chooses tokens. Pure: a function of logits, parameters and the sequence's own history, whatever it is batched with. */
import type { SampledToken, SamplingParams } from '../sequence/sampling.ts'

/** Uniform in [0, 1) from seed and counter: stateless, so eviction and recomputation do not shift the draws. */
export function uniform (seed: number, counter: number): number {
  let h = Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) ^ Math.imul(counter + 1, 0xc2b2ae35)
  const mix = (): number => {
    h = Math.imul(h ^ (h >>> 16), 0x21f0aaad)
    h = Math.imul(h ^ (h >>> 15), 0x735a2d97)
    h ^= h >>> 15
    return h >>> 0
  }
  return (mix() * 2 ** 21 + (mix() >>> 11)) / 2 ** 53
}

/** Index of the largest value; of equal ones the lowest. */
export function argmax (logits: Float32Array): number {
  let best = 0
  let value = -Infinity
  for (let i = 0; i < logits.length; i++) {
    const v = logits[i] as number
    if (v > value) {
      value = v
      best = i
    }
  }
  return best
}

/** Throws unless there is a largest one: NaN and +Infinity mean that the sequence's numbers are broken. -Infinity rules a token out. */
function checkLogits (logits: Float32Array): void {
  let possible = false
  for (let i = 0; i < logits.length; i++) {
    const v = logits[i] as number
    if (!(v < Infinity)) throw new Error('logits that are not finite')
    if (v > -Infinity) possible = true
  }
  if (!possible) throw new Error('logits that are not finite')
}

/** Rules out the tokens without a bit. */
function applyMask (logits: Float32Array, mask: Uint32Array): void {
  let possible = false
  for (let i = 0; i < logits.length; i++) {
    if (((mask[i >>> 5] ?? 0) >>> (i & 31) & 1) === 0) logits[i] = -Infinity
    else if ((logits[i] as number) > -Infinity) possible = true
  }
  if (!possible) throw new Error('no token that the grammar of the answer allows')
}

function logSumExp (logits: Float32Array): number {
  let max = -Infinity
  for (let i = 0; i < logits.length; i++) if ((logits[i] as number) > max) max = logits[i] as number
  let sum = 0
  for (let i = 0; i < logits.length; i++) sum += Math.exp((logits[i] as number) - max)
  return max + Math.log(sum)
}

/** The `count` largest, best first; equal ones by index. */
function largest (logits: Float32Array, count: number): number[] {
  const top: number[] = []
  for (let i = 0; i < logits.length; i++) {
    const v = logits[i] as number
    if (top.length === count && v <= (logits[top[count - 1] as number] as number)) continue
    let at = top.length
    while (at > 0 && v > (logits[top[at - 1] as number] as number)) at--
    top.splice(at, 0, i)
    if (top.length > count) top.pop()
  }
  return top
}

/** Sampling state of one sequence: which tokens it has seen. */
export class Sampler {
  readonly params: SamplingParams
  readonly #plain: boolean
  readonly #seen = new Set<number>()
  readonly #counts = new Map<number, number>()
  #generated: number

  /** `tokens`: prompt and output so far. */
  constructor (params: SamplingParams, tokens: ArrayLike<number>, promptLength: number) {
    this.params = params
    this.#generated = tokens.length - promptLength
    const penalties = params.repetitionPenalty !== 1 || params.presencePenalty !== 0 || params.frequencyPenalty !== 0
    this.#plain = !penalties && params.logitBias.length === 0 && params.minTokens === 0
    if (!penalties) return
    for (let i = 0; i < tokens.length; i++) {
      this.#seen.add(tokens[i] as number)
      if (i >= promptLength) this.#count(tokens[i] as number)
    }
  }

  #count (token: number): void {
    this.#counts.set(token, (this.#counts.get(token) ?? 0) + 1)
  }

  /** The next token, one that `mask` has a bit for. `logits` may be changed in place. */
  sample (logits: Float32Array, mask?: Uint32Array): SampledToken {
    const { temperature, topLogprobs } = this.params
    checkLogits(logits)
    const raw = topLogprobs === undefined ? undefined : this.#logprobs(logits, topLogprobs, mask !== undefined)
    if (!this.#plain) this.#adjust(logits)
    if (mask !== undefined) applyMask(logits, mask)
    const token = temperature === 0 ? argmax(logits) : this.#draw(logits)
    this.#generated++
    if (!this.#plain) {
      this.#seen.add(token)
      this.#count(token)
    }
    return raw === undefined ? { token } : { token, logprob: raw.of(token), top: raw.top }
  }

  #logprobs (logits: Float32Array, count: number, masked: boolean): { of: (token: number) => number, top: Array<{ token: number, logprob: number }> } {
    const total = logSumExp(logits)
    const original = this.#plain && !masked ? logits : logits.slice()
    const of = (token: number): number => (original[token] as number) - total
    return { of, top: largest(logits, count).map(token => ({ token, logprob: of(token) })) }
  }

  #adjust (logits: Float32Array): void {
    const { repetitionPenalty, presencePenalty, frequencyPenalty, logitBias, minTokens, eosIds, stopIds } = this.params
    if (repetitionPenalty !== 1) {
      for (const token of this.#seen) {
        const v = logits[token] as number
        logits[token] = v > 0 ? v / repetitionPenalty : v * repetitionPenalty
      }
    }
    for (const [token, count] of this.#counts) logits[token] = (logits[token] as number) - presencePenalty - frequencyPenalty * count
    for (const [token, bias] of logitBias) logits[token] = (logits[token] as number) + bias
    if (this.#generated < minTokens) for (const id of [...eosIds, ...stopIds]) logits[id] = -Infinity
  }

  /** Temperature, then top-k, top-p and min-p over what is left, then one draw. */
  #draw (logits: Float32Array): number {
    const { temperature, topK, topP, minP, seed } = this.params
    const max = logits[argmax(logits)] as number
    let candidates: number[] = []
    // exp() of anything below is 0 in float64's company of 1: dropping it here keeps the sort short for large vocabularies.
    const floor = minP > 0 ? max + temperature * Math.log(minP) : max - 40 * temperature
    for (let i = 0; i < logits.length; i++) if ((logits[i] as number) >= floor) candidates.push(i)
    if (topK > 0 || topP < 1) candidates.sort((a, b) => (logits[b] as number) - (logits[a] as number) || a - b)
    if (topK > 0) candidates = candidates.slice(0, topK)
    const weights = candidates.map(i => Math.exp(((logits[i] as number) - max) / temperature))
    let total = weights.reduce((sum, w) => sum + w, 0)
    if (topP < 1) {
      let kept = 0
      let mass = 0
      while (kept < weights.length && mass < topP * total) mass += weights[kept++] as number
      candidates.length = weights.length = Math.max(kept, 1)
      total = Math.max(mass, weights[0] as number)
    }
    let left = uniform(seed, this.#generated) * total
    for (let i = 0; i < candidates.length; i++) {
      left -= weights[i] as number
      if (left < 0) return candidates[i] as number
    }
    return candidates[candidates.length - 1] as number
  }
}
