import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { Test } from 'tap'
import { deferred } from '../../engines/service/waiting.ts'

export interface SlowPicture {
  readonly url: string
  /** Lets the bytes go: the picture's, or others. */
  send (bytes?: Buffer): void
}

/** A picture whose bytes come when they are let go: until then its encode call is not answered. */
export async function slowPicture (t: Test, dataUrl: string): Promise<SlowPicture> {
  const bytes = deferred<Buffer>()
  const server = createServer((_request, response) => {
    bytes.promise.then(body => { response.end(body) })
  })
  await new Promise<void>(resolve => { server.listen(0, '127.0.0.1', resolve) })
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  const picture = Buffer.from(dataUrl.slice(dataUrl.indexOf(',') + 1), 'base64')
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`, send: (body = picture) => { bytes.resolve(body) } }
}
