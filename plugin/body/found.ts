import type { ScalarKind } from './json-scanner.ts'

/** Where a top-level member stands. */
export interface Member {
  /** Undefined when it is unreasonably long: nobody asks for it. */
  readonly name: string | undefined
  /** Position among the top-level members. */
  readonly index: number
  /** The opening quote of the name. */
  readonly start: number
  valueStart: number
  end: number
  kind: ScalarKind | 'object' | 'array'
  escaped: boolean
}

/** A media part as found; what takes time (hash, size) is added later. */
export interface FoundMedia {
  readonly message: number
  readonly part: number
  readonly type: string
  readonly url: { readonly start: number, readonly end: number }
  readonly escaped: boolean
  readonly span: { readonly start: number, readonly end: number }
}

/** The member of this name, if it is there. */
export function memberOf (members: readonly Member[], name: string): Member | undefined {
  for (const member of members) if (member.name === name) return member
  return undefined
}
