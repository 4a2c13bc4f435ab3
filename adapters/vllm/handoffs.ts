import { AdapterError, type AdapterNode, type BodyEdits, type EncoderResult, type MediaPart, type Modality, type NodeInfo, type RequestBody } from '../adapter.ts'
import type { FailureReader } from '../http.ts'
import type { Encoded } from './encode.ts'
import { isEngineDead } from './failures.ts'
import { pushedParams } from './received.ts'

/** How features reach PD. `auto`: rewritten where the encoder names where they lie, else raw. */
export type Choice = 'auto' | 'raw' | 'rewrite'

/**
 * What is known of each process: whether an encoder vouches for its features by a handle, and whether a language model
 * takes a request without pixels. Rewritten, PD fetches and reads no picture a second time; but where the features are
 * gone its process ends, or at best the request fails. Kept by the probe's answer, which a restart replaces.
 */
export class Handoffs {
  readonly #choice: Choice
  readonly #vouching = new WeakSet<NodeInfo>()
  readonly #refusing = new WeakSet<NodeInfo>()

  constructor (choice: Choice) {
    this.#choice = choice
  }

  between (encoder: AdapterNode, consumer: AdapterNode): 'raw' | 'rewrite' {
    if (this.#choice === 'raw' || (consumer.info !== undefined && this.#refusing.has(consumer.info))) return 'raw'
    if (this.#choice === 'rewrite') return 'rewrite'
    return encoder.info !== undefined && this.#vouching.has(encoder.info) ? 'rewrite' : 'raw'
  }

  /** An encoder has answered. */
  encoded ({ info }: AdapterNode, results: readonly EncoderResult[]): void {
    if (info !== undefined && results.some(({ wire }) => isVouched(wire as Encoded))) this.#vouching.add(info)
  }

  /**
   * The body with features in place of pixels; undefined when none may be. All or nothing for each modality: vLLM takes
   * no request with both pictures and embeddings, nor embeddings of different kinds.
   */
  rewrite ({ info }: AdapterNode, body: RequestBody, features: readonly EncoderResult[], pinned: BodyEdits): BodyEdits | undefined {
    if (this.#choice === 'raw' || (info !== undefined && this.#refusing.has(info)) || pinned.mediaParts === undefined) return undefined
    const encoded = new Map(features.map(({ item, wire }) => [item, wire as Encoded]))
    const mediaParts = [...pinned.mediaParts]
    const params: Record<string, unknown> = {}
    for (const modality of new Set(body.media.map(item => item.modality))) {
      const items = body.media.filter(item => item.modality === modality)
      const wires = items.map(item => encoded.get(item.index))
      if (!wires.every(wire => wire !== undefined && this.#mayReplace(wire)) || !alike(wires)) continue
      for (const [i, { index }] of items.entries()) {
        mediaParts[index] = embedsPart(modality, wires[i]!)
        params[wires[i]!.key!] = wires[i]!.entry
      }
    }
    return Object.keys(params).length === 0 ? undefined : { ...pinned, mediaParts, set: { ...pinned.set, ec_transfer_params: JSON.stringify(pushedParams(features) ?? params) } }
  }

  /** Of an answer to a rewritten body: FEATURES_GONE means that the client's own body may do. With `pushed`, that the features have not arrived, or not in a form that the node takes. */
  failuresOf ({ info }: AdapterNode, other: FailureReader, pushed: boolean): FailureReader {
    return failure => {
      const { node, statusCode, error } = failure
      const refuses = /--enable-mm-embeds/.test(error.message ?? '')
      if (refuses && info !== undefined) this.#refusing.add(info)
      if ((statusCode === 400 && (refuses || !pushed)) || (statusCode === 500 && !isEngineDead(failure))) return new AdapterError('FEATURES_GONE', `${node.id} did not take the features: ${error.message ?? statusCode}`, { node: node.id })
      return other(failure)
    }
  }

  #mayReplace (wire: Encoded): boolean {
    return wire.key !== undefined && wire.metadata !== undefined && Object.keys(wire.metadata).length > 0 && wire.pin.rewritable && (this.#choice === 'rewrite' || isVouched(wire))
  }
}

/** More than the file connector says: where the features lie. */
function isVouched ({ entry }: Encoded): boolean {
  return entry !== undefined && Object.keys(entry).some(name => name !== 'metadata' && name !== 'item_indices')
}

function alike (wires: ReadonlyArray<Encoded | undefined>): boolean {
  return new Set(wires.map(wire => Object.keys(wire!.metadata!).sort().join())).size === 1
}

function embedsPart (modality: Modality, { key, metadata }: Encoded): MediaPart {
  const type = `${modality}_embeds`
  return { before: JSON.stringify({ type, [type]: metadata, uuid: key }) }
}
