/** What sources find. */
import type { Role } from '../../adapters/adapter.ts'

/** A process behind a URL. */
export interface Found {
  readonly host: string
  readonly port: number
  readonly role?: Role | undefined
}

/** Takes all that there is now, whenever that changes. */
export type Give = (found: readonly Found[]) => void
