/** Forms (multipart/form-data, RFC 7578) as bytes: one field is looked up. What two parsers would read differently is refused. */
import { CONTROL_FIELDS } from '../../body/index.ts'
import { epdError, type EpdError } from '../../errors.ts'

const CRLF = '\r\n'
/** As Starlette's: so many fields and as many files. */
const MAX_PARTS = 2_000
/** Of a part, in bytes. */
const MAX_HEAD = 8_192
/** Servers read escapes differently: a quote ends a value here, and may not follow a backslash. */
const PARAMETER = /[ \t]*;[ \t]*([!#$%&'*+.^`|~\w-]+)=(?:"([^"]*)"|([^\s;"\\,<>]+))/gy
const HEADER = /^([!#$%&'*+.^`|~\w-]+):[ \t]*([^\r\n]*)$/

/**
 * Value of a text field of a form; undefined when it has none of this name, or is none that has this boundary.
 *
 * @throws EPD_ERR_INVALID_BODY where a node could find another value, such as in a field that comes twice
 */
export function formField (form: Buffer, contentType: string, name: string): string | undefined {
  const { boundary, charset = 'utf-8' } = Object.fromEntries(parametersOf(contentType))
  if (boundary === undefined) return undefined
  if (!/^(?!.* $)[ -[\]-~]{1,70}$/.test(boundary) || !/^utf-?8$/i.test(charset)) throw ambiguous('the content type')
  const delimiter = `--${boundary}`
  const isForm = form.indexOf(delimiter) === 0
  if (form.includes(`\r${delimiter}`) || (!isForm && form.includes(`\n${delimiter}`))) throw ambiguous('the boundaries')
  if (!isForm) return undefined
  let value: string | undefined
  let found = false
  for (let at = delimiter.length, parts = 0; form.toString('latin1', at, at + 2) !== '--'; parts++) {
    const next = form.indexOf(`\n${delimiter}`, at)
    const headEnd = form.subarray(0, at + MAX_HEAD).indexOf(CRLF + CRLF, at)
    if (parts === MAX_PARTS || next === -1 || form[next - 1] !== 0x0d || headEnd === -1 || headEnd + 5 > next) throw ambiguous('the parts')
    const lines = form.toString('latin1', at, headEnd).split(CRLF)
    if (lines.shift() !== '') throw ambiguous('the boundaries')
    const part = partOf(lines)
    if (CONTROL_FIELDS.includes(part.name)) throw epdError('EPD_ERR_INVALID_VALUE', [`${part.name} is not for clients to set`], { param: part.name })
    if (part.name === name) {
      if (found || part.encoded) throw ambiguous(`the field ${name}`)
      found = true
      // A part with a file name is a file, whatever its field is called.
      if (!part.file) value = form.toString('utf8', headEnd + 4, next - 1)
    }
    at = next + 1 + delimiter.length
  }
  return value
}

function partOf (lines: readonly string[]): { readonly name: string, readonly file: boolean, readonly encoded: boolean } {
  const headers = new Map<string, string>()
  for (const line of lines) {
    const [, name, value] = HEADER.exec(line) ?? []
    if (name === undefined || headers.has(name.toLowerCase())) throw ambiguous('the headers of a part')
    headers.set(name.toLowerCase(), value!)
  }
  const disposition = headers.get('content-disposition')
  const parameters = disposition === undefined || !/^form-data[ \t]*(;|$)/i.test(disposition) ? undefined : parametersOf(disposition)
  const name = parameters?.get('name')
  if (name === undefined || name.includes('\\')) throw ambiguous('the name of a part')
  return { name, file: parameters!.has('filename') || parameters!.has('filename*'), encoded: !/^([78]bit|binary)$/i.test(headers.get('content-transfer-encoding') ?? '8bit') }
}

/** What follows the first word of a header. */
function parametersOf (header: string): Map<string, string> {
  const start = header.indexOf(';')
  const found = new Map<string, string>()
  const text = start === -1 ? '' : header.slice(start)
  let end = 0
  for (const match of text.matchAll(PARAMETER)) {
    const [name, value] = [match[1]!.toLowerCase(), match[2] ?? match[3]!]
    if (found.has(name) || value.endsWith('\\') || (name.includes('*') && name !== 'filename*')) throw ambiguous(`the parameter ${name}`)
    found.set(name, value)
    end = match.index + match[0].length
  }
  if (!/^[ \t]*;?[ \t]*$/.test(text.slice(end))) throw ambiguous('the parameters of a header')
  return found
}

function ambiguous (what: string): EpdError {
  return epdError('EPD_ERR_INVALID_BODY', [`Servers would not agree on ${what} of this form`])
}
