/** BUSY: no room within the given time, or too many already wait; try again later. TOO_LARGE: would never fit. */
export type CacheErrorCode = 'BUSY' | 'TOO_LARGE'

export class CacheError extends Error {
  override readonly name = 'CacheError'
  readonly code: CacheErrorCode

  constructor (code: CacheErrorCode, message: string) {
    super(message)
    this.code = code
  }
}
