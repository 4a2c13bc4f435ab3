/** From an upstream's answer to the client's: bytes as they come, with back-pressure. */
export { ClientGoneError, clientGone } from './client-gone.ts'
export { isClosed, offClosed, onClosed } from './closed.ts'
export { relay } from './relay.ts'
export type { RelayOptions, RelayResult, StreamError } from './relay.ts'
export type { Usage } from './tail.ts'
