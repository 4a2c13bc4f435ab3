/** JSON with comments and trailing commas, as editors know it (JSONC). */
import { findNodeAtLocation, getNodeValue, parseTree, printParseErrorCode, type Node, type ParseError } from 'jsonc-parser'

/** A configuration's value, and where in its text each part of it stands. */
export interface Parsed {
  readonly value: unknown
  /** Undefined where there is no such part. */
  offsetOf (path: readonly string[]): number | undefined
}

/** What keeps a text from being read, and where. */
export class SyntaxMistake extends Error {
  readonly offset: number

  constructor (message: string, offset: number) {
    super(message)
    this.offset = offset
  }
}

/** @throws SyntaxMistake */
export function parseJson (text: string): Parsed {
  const errors: ParseError[] = []
  const root = parseTree(text, errors, { allowTrailingComma: true })
  const [first] = errors
  if (first !== undefined || root === undefined) throw new SyntaxMistake(`not valid JSON (${first === undefined ? 'empty file' : printParseErrorCode(first.error)})`, first?.offset ?? 0)
  const twice = repeated(root)
  if (twice !== undefined) throw new SyntaxMistake(`${JSON.stringify(twice.value)} is given twice`, twice.offset)
  return { value: getNodeValue(root), offsetOf: path => findNodeAtLocation(root, path.map(part => (/^\d+$/.test(part) ? Number(part) : part)))?.offset }
}

/** The key of a member that is given twice: JSON.parse would silently take the last one. */
function repeated (node: Node): Node | undefined {
  const keys = new Set<unknown>()
  for (const child of node.children ?? []) {
    const [key] = child.type === 'property' ? child.children! : []
    if (key !== undefined && keys.has(key.value)) return key
    if (key !== undefined) keys.add(key.value)
    const below = repeated(child)
    if (below !== undefined) return below
  }
  return undefined
}
