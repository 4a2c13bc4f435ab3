import type { Session, TensorData } from '../../runtime/types.ts'
import type { Elements } from './elements.ts'

/** One output tensor of new keys or values: `[rows, heads, length, dim]`, in which the new tokens begin at `offset`. */
export interface NewTokens {
  readonly data: Elements
  readonly length: number
  readonly offset: number
}

const ONE: TensorData = { type: 'int64', dims: [], data: new BigInt64Array([1n]) }

/** The decoder's inputs and outputs by name, with the cheapest outputs that hold new keys and values. */
export class DecoderGraph {
  readonly session: Session
  readonly pastNames: readonly string[]
  /** `delta.*` if the graph has them; else `present.*`, which copies the whole past at about 1 ms per MB. */
  readonly #newNames: readonly string[]
  readonly hasDelta: boolean
  readonly #withLogits: readonly string[]

  constructor (session: Session, layers: number) {
    this.session = session
    const names = (prefix: string): string[] => Array.from({ length: layers }, (_, i) => [`${prefix}.${i}.key`, `${prefix}.${i}.value`]).flat()
    const outputs = new Set(session.outputs.map(spec => spec.name))
    this.pastNames = names('past_key_values')
    this.hasDelta = names('delta').every(name => outputs.has(name))
    this.#newNames = names(this.hasDelta ? 'delta' : 'present')
    this.#withLogits = ['logits', ...this.#newNames]
    const inputs = new Set(session.inputs.map(spec => spec.name))
    const missing = [
      ...['inputs_embeds', 'attention_mask', ...this.pastNames].filter(name => !inputs.has(name)),
      ...this.#withLogits.filter(name => !outputs.has(name))
    ]
    if (missing.length > 0) throw new Error(`the decoder graph lacks: ${missing.join(', ')}`)
  }

  /** Runs the graph. `pastLength` and `newLength`: tokens per row in `feeds`. */
  async run (feeds: Record<string, TensorData>, pastLength: number, newLength: number, logits: boolean): Promise<{ logits: TensorData | undefined, added: NewTokens[] }> {
    feeds.num_logits_to_keep = ONE
    const out = await this.session.run(feeds, logits ? this.#withLogits : this.#newNames)
    const length = this.hasDelta ? newLength : pastLength + newLength
    const offset = this.hasDelta ? 0 : pastLength
    const added = this.#newNames.map(name => ({ data: (out[name] as TensorData).data as Elements, length, offset }))
    return { logits: out.logits, added }
  }
}
