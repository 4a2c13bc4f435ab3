import { Workload, type PreparedRequest, type WorkloadOptions } from './workload.ts'

/** Requests that are made before they are due, where their pictures leave room for so many. */
const AHEAD = 64
const AHEAD_BYTES = 256 * 1024 * 1024

/** Requests that are ready before they are due. */
export interface Stock { take (): Promise<PreparedRequest> }

/** Resolves when the stock is full. */
export async function stockOf (options: WorkloadOptions, requests: number): Promise<Stock> {
  const workload = await Workload.create(options)
  const room = Math.floor(AHEAD_BYTES / Math.max(1, options.pictures * options.width * options.height * 3))
  const ahead = Math.min(AHEAD, Math.max(2, room))
  const ready: Array<Promise<PreparedRequest>> = []
  let made = 0
  const make = (): void => {
    if (made >= requests) return
    made++
    const next = workload.next()
    // Whoever takes it learns of a failure.
    next.catch(() => {})
    ready.push(next)
  }
  for (let i = 0; i < ahead; i++) make()
  await Promise.all(ready)
  let filling = false
  // One at a time, and after whatever is due: requests leave and answers come in before the next is made.
  const fill = (): void => {
    if (filling || ready.length >= ahead || made >= requests) return
    filling = true
    setImmediate(() => {
      filling = false
      make()
      fill()
    })
  }
  return {
    async take () {
      if (ready.length === 0) make()
      const next = ready.shift()!
      fill()
      return await next
    }
  }
}
