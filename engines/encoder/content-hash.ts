import { createHash } from 'node:crypto'

export interface ContentKey {
  readonly fingerprint: string
  /** Identity of the vision weights. */
  readonly vision: string
  readonly settings: string
  readonly tenant: string
}

/**
 * The only key of feature caches: over the media bytes and everything that decides what features they become, and
 * whose they are. 64 hex digits.
 */
export function contentHash (bytes: Uint8Array, key: ContentKey): string {
  // JSON keeps the parts apart: no two keys give the same text.
  return createHash('sha256').update(JSON.stringify([key.fingerprint, key.vision, key.settings, key.tenant])).update('\n').update(bytes).digest('hex')
}
