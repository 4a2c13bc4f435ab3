import t from 'tap'
import { abortable, Semaphore } from '../../engines/service/waiting.ts'

t.test('a semaphore lets its number in, the others in order, and forgets those that leave the line', async t => {
  const places = new Semaphore(1)
  const { signal } = new AbortController()
  const leave = await places.enter(signal)
  const stop = new AbortController()
  const second = places.enter(stop.signal)
  const third = places.enter(signal)
  t.equal(places.waiting, 2)
  stop.abort(new Error('bye'))
  await t.rejects(second, { message: 'bye' })
  await t.rejects(places.enter(stop.signal), { message: 'bye' })
  leave()
  leave()
  const leaveThird = await third
  t.equal(places.waiting, 0)
  leaveThird()
  ;(await places.enter(signal))()
})

t.test('a place that is handed over as its taker gives up goes to the next in line', async t => {
  const places = new Semaphore(1)
  const leave = await places.enter()
  const stop = new AbortController()
  const second = places.enter(stop.signal)
  const third = places.enter()
  leave()
  stop.abort(new Error('bye'))
  const left = await second.catch(() => undefined)
  left?.()
  ;(await third)()
  t.equal(places.waiting, 0)
  ;(await places.enter())()
})

t.test('a promise is cut short by the signal of one waiter alone', async t => {
  const stop = new AbortController()
  const promise = new Promise<number>(resolve => { setImmediate(() => { resolve(1) }) })
  const short = abortable(promise, stop.signal)
  stop.abort(new Error('bye'))
  await t.rejects(short, { message: 'bye' })
  await t.rejects(abortable(promise, stop.signal), { message: 'bye' })
  t.equal(await abortable(promise, undefined), 1)
})
