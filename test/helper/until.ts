import { setTimeout as delay } from 'node:timers/promises'

/** Polls until `check` gives something truthy, and returns it; fails after `ms`. For states no event announces. */
export async function until<T> (check: () => T | Promise<T>, what: string, ms = 10_000): Promise<NonNullable<T>> {
  const end = performance.now() + ms
  for (;;) {
    const value = await check()
    if (value) return value
    if (performance.now() > end) throw new Error(`waited ${ms} ms in vain until ${what}`)
    await delay(5)
  }
}
