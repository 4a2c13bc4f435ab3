import { setTimeout as delay } from 'node:timers/promises'

/** What takes long is looked at less often: a look at another process costs both of them a few milliseconds. */
const LONGEST_PAUSE_MS = 30

/**
 * Polls until `check` gives something truthy, and returns it; fails after `ms`. For states no event announces. A check that
 * asks several processes is made less often than `every` 5 ms.
 */
export async function until<T> (check: () => T | Promise<T>, what: string, ms = 60_000, every = 5): Promise<NonNullable<T>> {
  const start = performance.now()
  for (;;) {
    const value = await check()
    if (value) return value
    const waited = performance.now() - start
    if (waited > ms) throw new Error(`waited ${ms} ms in vain until ${what}`)
    await delay(Math.max(every, Math.min(waited / 20, LONGEST_PAUSE_MS)))
  }
}
