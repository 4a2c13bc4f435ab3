/** The request body as bytes: read, scan, splice. */
export { parseBody, parseBodyValue, type Body } from './body.ts'
export { fingerprint } from './fingerprint.ts'
export { CONTROL_FIELDS } from './members.ts'
export { openingOf } from './opening.ts'
export { readBody, type ReadBodyOptions, type RequestLike } from './read.ts'
