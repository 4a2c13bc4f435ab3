/**
 * NOT_LINKED no link to that engine; STALE the engine restarted since; GONE the lease ended, or the peer is lost;
 * CORRUPT a chunk failed its checksum; TIMEOUT; REFUSED the peers can't or may not talk; CLOSED this node is closed;
 * ABORTED by the caller's signal.
 */
export type P2PErrorCode = 'NOT_LINKED' | 'STALE' | 'GONE' | 'CORRUPT' | 'TIMEOUT' | 'REFUSED' | 'CLOSED' | 'ABORTED'

export class P2PError extends Error {
  override readonly name = 'P2PError'
  readonly code: P2PErrorCode

  constructor (code: P2PErrorCode, message: string, options?: { cause?: unknown }) {
    super(message, options)
    this.code = code
  }
}
