/**
 * Preloaded (`--import`) into tap, the test files and the processes they start: ends this process when its parent or its
 * grandparent is gone, so that a test run that is killed leaves nothing behind, however it was killed.
 */
import { readFileSync } from 'node:fs'

const INTERVAL_MS = 500

/** Parent of a process; undefined where /proc does not say. */
function parentOf (pid: number): number | undefined {
  try {
    return Number(/^PPid:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1])
  } catch {
    return undefined
  }
}

const parent = process.ppid
const grandparent = parentOf(parent)

setInterval(() => {
  if (process.ppid !== parent || parentOf(parent) !== grandparent) process.kill(process.pid, 'SIGKILL')
}, INTERVAL_MS).unref()
