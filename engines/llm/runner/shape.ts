import type { ElementType } from './elements.ts'

/** What the session worker must know of the model and the pools. Structured-clonable. */
export interface RunnerShape {
  /** Paths of the graphs. */
  readonly embed: string
  readonly decoder: string
  readonly layers: number
  readonly kvHeads: number
  readonly headDim: number
  readonly hiddenSize: number
  readonly dtype: ElementType
  /** Tokens of a KV block. */
  readonly blockTokens: number
  /** Rows of a feature block. */
  readonly featureBlockTokens: number
  /** Rows of position ids: 1, or 3 for M-RoPE. */
  readonly positionAxes: 1 | 3
}

/** Elements of one KV block, laid out [layer][key, value][head][token][dim]. */
export function kvBlockElements (shape: Pick<RunnerShape, 'layers' | 'kvHeads' | 'headDim' | 'blockTokens'>): number {
  return shape.layers * 2 * shape.kvHeads * shape.headDim * shape.blockTokens
}
