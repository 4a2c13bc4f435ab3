/** Forms (multipart/form-data, RFC 7578) as bytes: one field is looked up, nothing else of the form is read. */

const CRLF = '\r\n'

/** Value of a text field of a form; undefined when it has none of this name. */
export function formField (form: Buffer, contentType: string, name: string): string | undefined {
  const boundary = /;\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))/i.exec(contentType)
  if (boundary === null) return undefined
  const delimiter = Buffer.from(`--${boundary[1] ?? boundary[2]}`)
  for (let at = form.indexOf(delimiter); at !== -1;) {
    const start = at + delimiter.length
    const next = form.indexOf(CRLF + delimiter.toString(), start)
    const headEnd = form.indexOf(CRLF + CRLF, start)
    if (next === -1 || headEnd === -1 || headEnd > next) return undefined
    if (namedSo(form.toString('utf8', start, headEnd), name)) return form.toString('utf8', headEnd + 4, next)
    at = next + CRLF.length
  }
  return undefined
}

/** A part with a file name is a file, whatever its field is called. */
function namedSo (head: string, name: string): boolean {
  const disposition = /^content-disposition:\s*form-data(.*)$/im.exec(head)?.[1] ?? ''
  return !/;\s*filename\*?=/i.test(disposition) && (/;\s*name="([^"]*)"/i.exec(disposition)?.[1] ?? /;\s*name=([^\s;]+)/i.exec(disposition)?.[1]) === name
}
