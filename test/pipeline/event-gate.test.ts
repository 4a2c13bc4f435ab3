/** Whole events only, however the bytes of a stream are cut. */
import t from 'tap'
import { EventGate } from '../../plugin/pipeline/event-gate.ts'
import { Random } from '../body/random-json.ts'
import { cut } from '../relay/upstreams.ts'

const ENDS = ['\n\n', '\r\n\r\n', '\r\r']

/** What may pass of bytes that have been held, by a look at all of them. */
function passing (held: Buffer): number {
  return Math.max(...ENDS.map(end => held.lastIndexOf(end) === -1 ? 0 : held.lastIndexOf(end) + end.length))
}

t.test('at every cut what passes is all whole events, and all bytes come out', t => {
  const random = new Random(5)
  for (let i = 0; i < 300; i++) {
    const bytes = Buffer.from(Array.from({ length: 1 + random.below(12) }, () => random.pick(['data: x', '\n', '\r', '\r\n', ...ENDS])).join(''))
    const places = i % 3 === 0 ? Array.from(bytes.keys()) : Array.from({ length: random.below(8) }, () => random.below(bytes.length))
    const gate = new EventGate()
    let held = Buffer.alloc(0)
    const seen: Buffer[] = []
    for (const chunk of cut(bytes, places).filter(({ length }) => length > 0)) {
      held = Buffer.concat([held, chunk])
      const passed = gate.pass(chunk) ?? Buffer.alloc(0)
      const length = passing(held)
      if (!passed.equals(held.subarray(0, length))) t.fail(`${JSON.stringify(bytes.toString())} at ${places.join()}: ${JSON.stringify(passed.toString())}`)
      held = held.subarray(length)
      seen.push(passed)
    }
    if (!Buffer.concat([...seen, gate.rest() ?? Buffer.alloc(0)]).equals(bytes)) t.fail(`${JSON.stringify(bytes.toString())} at ${places.join()}: other bytes`)
  }
  t.end()
})

t.test('an event that comes byte by byte is copied a few times, not once for each byte', t => {
  const gate = new EventGate()
  const event = Buffer.from(`data: ${'x'.repeat(20_000)}\n\n`)
  const { concat, prototype: { set } } = Buffer
  t.teardown(() => { Object.assign(Buffer, { concat }); Object.assign(Buffer.prototype, { set }) })
  let copied = 0
  Buffer.concat = list => {
    copied += list.reduce((sum, { length }) => sum + length, 0)
    return concat(list)
  }
  Buffer.prototype.set = function (bytes: ArrayLike<number>, at?: number) {
    copied += bytes.length
    set.call(this, bytes, at)
  }
  const passed = [...event.keys()].map(i => gate.pass(event.subarray(i, i + 1))).filter(bytes => bytes !== undefined)
  t.same(passed.map(({ length }) => length), [event.length])
  t.ok(copied < 8 * event.length, `${copied} bytes copied`)
  t.end()
})
