import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { StoredSpan } from '../traces/span.ts'

/** Something that went wrong on a node: a call to it, or a stage in it. */
export interface NodeError {
  /** Milliseconds of Unix time. */
  readonly at: number
  readonly traceId: string
  /** Name of the span. */
  readonly span: string
  readonly code: string
  readonly message: string
}

const KEPT = 20
const MAX_NODES = 256
const MAX_MESSAGE = 256
/** Spans of the whole request, which name a node that need not be the one to blame. */
const WHOLE: ReadonlySet<string> = new Set([SPAN.plan, SPAN.encode])

/** The last errors of each node, from the spans, in 6 MiB at most; they stay when their traces have left the store. */
export class NodeErrors {
  readonly #byNode = new Map<string, NodeError[]>()

  note ({ name, traceId, endTime: [seconds, nanoseconds], attributes, message = '', instance, status }: StoredSpan): void {
    if (status !== 'error' || WHOLE.has(name) || attributes[ATTR.operation] !== undefined) return
    const { [ATTR.node]: node = instance, [ATTR.errorType]: code = 'error' } = attributes
    if (typeof node !== 'string') return
    let errors = this.#byNode.get(node)
    if (errors === undefined) {
      // The node whose first error is oldest leaves.
      if (this.#byNode.size >= MAX_NODES) this.#byNode.delete(this.#byNode.keys().next().value!)
      this.#byNode.set(node, errors = [])
    }
    errors.unshift({ at: Math.round(seconds * 1e3 + nanoseconds / 1e6), traceId, span: name, code: short(String(code)), message: short(message) })
    if (errors.length > KEPT) errors.pop()
  }

  /** Newest first. */
  of (node: string): readonly NodeError[] {
    return this.#byNode.get(node) ?? []
  }
}

/** A copy: a slice would keep the whole text in memory. */
function short (text: string): string {
  return text.length <= MAX_MESSAGE ? text : Buffer.from(text.slice(0, MAX_MESSAGE)).toString()
}
