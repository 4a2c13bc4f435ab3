import { readFileSync, writeFileSync } from 'node:fs'

/** Resident memory in bytes, now or at its highest, where /proc reports it. */
export function memory (name: 'VmRSS' | 'VmHWM'): number {
  try {
    return Number(new RegExp(`${name}:\\s+(\\d+) kB`).exec(readFileSync('/proc/self/status', 'utf8'))![1]) * 1024
  } catch {
    return name === 'VmRSS' ? process.memoryUsage.rss() : process.resourceUsage().maxRSS * 1024
  }
}

/** The highest so far is forgotten, where the kernel can. */
export function resetPeak (): void {
  try {
    writeFileSync('/proc/self/clear_refs', '5')
  } catch {}
}
