import { createHash } from 'node:crypto'
import t from 'tap'
import { parseBodyValue } from '../../plugin/body/index.ts'
import { Callers } from '../../plugin/pipeline/index.ts'
import { startRequest } from '../../plugin/telemetry/spans.ts'
import { Tracing } from '../../plugin/telemetry/tracing.ts'
import { chat, pictureUrl } from '../helper/fake-gateway.ts'
import { sameFingerprint } from '../helper/same-fingerprint.ts'

t.test('an encode call without an id finds the request whose pictures it has, not one whose pictures have the same fingerprints', async t => {
  const callers = new Callers()
  const urls = [pictureUrl(1), pictureUrl(2)]
  const open = async (callId: string, ...pictures: string[]): Promise<() => void> => {
    const body = await parseBodyValue(chat('?', ...pictures))
    return callers.add({ callId, request: { body }, trace: startRequest(new Tracing(), { headers: {}, model: 'm' }), encodedBy: [], cancel: () => {} })
  }
  const hashes = (...pictures: string[]) => (): string[] => pictures.map(url => createHash('sha256').update(url).digest('hex'))
  const end = await open('a', ...urls)
  t.equal(callers.find('?', hashes(sameFingerprint(urls[0]!))), undefined)
  t.equal(callers.find('?', hashes(urls[0]!, urls[0]!)), undefined, 'it stands there once')
  t.equal(callers.find('?', hashes(urls[1]!, urls[0]!))?.id, 'a')
  await open('b', sameFingerprint(urls[0]!))
  t.equal(callers.find('?', hashes(sameFingerprint(urls[0]!)))?.id, 'b')
  t.equal(callers.find('b', () => [])?.id, 'b', 'by the id where there is one')
  end()
  t.equal(callers.find('?', hashes(urls[0]!)), undefined, 'a request that has ended waits for none')
})
