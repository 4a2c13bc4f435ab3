import { setTimeout as delay } from 'node:timers/promises'

/**
 * Polls until `check` gives something truthy, and returns it; fails after `ms`. For states no event announces. A check that
 * asks several processes is made less often than `every` 5 ms.
 */
export async function until<T> (check: () => T | Promise<T>, what: string, ms = 60_000, every = 5): Promise<NonNullable<T>> {
  const end = performance.now() + ms
  for (;;) {
    const value = await check()
    if (value) return value
    if (performance.now() > end) throw new Error(`waited ${ms} ms in vain until ${what}`)
    await delay(every)
  }
}
