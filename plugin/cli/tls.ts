/** Certificate and key from files, read again when they change: a certificate is renewed while the gateway runs. */
import { unwatchFile, watchFile } from 'node:fs'
import type { Server } from 'node:https'
import { createSecureContext, type SecureContextOptions } from 'node:tls'
import type { Log } from '../../adapters/adapter.ts'
import type { TlsOptions } from '../options/index.ts'
import { readFailure, readNamedFile } from './named-file.ts'
import { UsageError } from './usage.ts'

/** How often the files are looked at. Looking is polling: the mounted secrets of Kubernetes are links that change as a whole. */
const LOOK_MS = 2_000

interface SecureOptions extends SecureContextOptions {
  readonly requestCert?: boolean
  readonly rejectUnauthorized?: boolean
}

export interface TlsFiles {
  readonly secure: SecureOptions
  /** Gives the server what the files hold whenever they change. Returns what ends that. */
  follow (server: Server, log: Log): () => Promise<void>
}

/** @throws UsageError when the files can't be read or do not fit each other */
export function tlsFiles (tls: TlsOptions): TlsFiles {
  const files = [tls.cert, tls.key, ...(tls.clientCa === undefined ? [] : [tls.clientCa])]
  return {
    secure: read(tls),
    follow (server, log) {
      let pending: NodeJS.Immediate | undefined
      const renew = (): void => {
        try {
          server.setSecureContext(read(tls))
          log.info({ cert: tls.cert }, 'certificate read again')
        } catch (err) {
          // Between the writing of two files they do not fit each other: the next change brings the other one.
          log.warn({ reason: (err as Error).message }, 'the changed certificate is not used')
        }
      }
      const changed = (): void => {
        clearImmediate(pending)
        pending = setImmediate(renew)
      }
      for (const file of files) watchFile(file, { interval: LOOK_MS, persistent: false }, changed)
      return async () => {
        clearImmediate(pending)
        for (const file of files) unwatchFile(file, changed)
      }
    }
  }
}

function read ({ cert, key, passphrase, clientCa }: TlsOptions): SecureOptions {
  const secure: SecureOptions = {
    cert: contents('cert', cert),
    key: contents('key', key),
    ...(passphrase === undefined ? {} : { passphrase }),
    ...(clientCa === undefined ? {} : { ca: contents('clientCa', clientCa), requestCert: true, rejectUnauthorized: true })
  }
  try {
    createSecureContext(secure)
  } catch (err) {
    throw new UsageError(`server.tls: ${cert} and ${key} make no certificate (${(err as Error).message})`)
  }
  return secure
}

function contents (member: string, file: string): Buffer {
  try {
    return readNamedFile(file)
  } catch (err) {
    throw new UsageError(`server.tls.${member}: can't read ${file} (${readFailure(err)})`)
  }
}
