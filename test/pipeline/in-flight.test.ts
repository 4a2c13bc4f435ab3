import { runInNewContext } from 'node:vm'
import { setFlagsFromString } from 'node:v8'
import { setImmediate as nextTurn } from 'node:timers/promises'
import t from 'tap'
import { InFlight } from '../../plugin/pipeline/in-flight.ts'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as (options?: { type: 'minor' }) => void

const TURNS = 10_000
/** Numbers in what each request holds: 2 KiB. */
const HELD = 256

class Request {
  readonly held = new Array<number>(HELD).fill(0.5)
  reason: unknown
  cancel (reason: unknown): void { this.reason = reason }
}

/** What is left of `turn`'s garbage after small collections, in bytes, when everything that lives is old. */
function leftOf (turn: () => void): number {
  for (let n = 0; n < 100; n++) turn()
  collect()
  collect()
  const before = process.memoryUsage().heapUsed
  for (let n = 0; n < TURNS; n++) {
    turn()
    if (n % 200 === 0) collect({ type: 'minor' })
  }
  collect({ type: 'minor' })
  collect({ type: 'minor' })
  return process.memoryUsage().heapUsed - before
}

t.test('requests that have ended need no collection of the whole heap, however busy the gateway is', async t => {
  const requests = new InFlight()
  const waiting: Request[] = []
  const left = leftOf(() => {
    const request = new Request()
    requests.add(request)
    waiting.push(request)
    if (waiting.length > 20) requests.delete(waiting.shift()!)
  })
  t.equal(requests.size, 20)
  // A Set leaves half of them.
  t.ok(left < TURNS * HELD * 8 / 10, `${left} bytes of ${TURNS * HELD * 8}`)
})

t.test('a request that is not in flight ends no other', async t => {
  const requests = new InFlight()
  const [one, other] = [new Request(), new Request()]
  requests.add(one)
  requests.delete(other)
  t.equal(requests.size, 1)
  requests.delete(one)
  requests.delete(one)
  t.equal(requests.size, 0)
})

t.test('the end of the grace cancels each request, also when they end as they are cancelled', async t => {
  const requests = new InFlight()
  const all = Array.from({ length: 5 }, () => {
    const request = new Request()
    request.cancel = reason => {
      request.reason = reason
      requests.delete(request)
    }
    requests.add(request)
    return request
  })
  await requests.drain(0, count => `${count} left`)
  t.same(all.map(({ reason }) => reason), all.map(() => '5 left'))
  t.equal(requests.size, 0)
})

t.test('settled waits for work in the background, failed work and work that begins meanwhile too', async t => {
  const requests = new InFlight()
  const done: string[] = []
  const work = async (name: string, before: Promise<unknown>): Promise<void> => {
    await before
    done.push(name)
    if (name === 'first') requests.background(work('later', nextTurn()))
    if (name === 'failed') throw new Error('it failed')
  }
  requests.background(work('first', Promise.resolve()))
  requests.background(work('failed', Promise.resolve()))
  await requests.settled()
  t.same(done, ['first', 'failed', 'later'])
})
