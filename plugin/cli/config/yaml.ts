import { isNode, parseDocument } from 'yaml'
import { SyntaxMistake, type Parsed } from './json.ts'

/** @throws SyntaxMistake */
export function parseYaml (text: string): Parsed {
  const document = parseDocument(text, { prettyErrors: false })
  // A warning is about a part that was not understood, such as an unknown tag: half of a configuration is none.
  const first = document.errors[0] ?? document.warnings[0]
  if (first !== undefined) throw new SyntaxMistake(`not valid YAML (${first.message})`, first.pos[0])
  // An editor may be about to write the rest: at a reload it would take all keys away.
  if (document.contents === null) throw new SyntaxMistake('not valid YAML (empty file; {} stands for the defaults)', 0)
  let value: unknown
  try {
    value = document.toJS()
  } catch (err) {
    // Aliases that multiply, or that have no anchor.
    throw new SyntaxMistake(`not valid YAML (${(err as Error).message})`, 0)
  }
  return {
    value,
    offsetOf: path => {
      const node = document.getIn(path.map(part => (/^\d+$/.test(part) ? Number(part) : part)), true)
      return isNode(node) ? node.range?.[0] : undefined
    }
  }
}
