/**
 * Preloaded (`--import`) into tap, the test files and the processes they start: ends this process when its parent or its
 * grandparent is gone, so that a test run that is killed leaves nothing behind, however it was killed; and when it has
 * nothing left to do.
 */
import { readFileSync } from 'node:fs'
import { isMainThread } from 'node:worker_threads'

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

// Node.js 20 sometimes waits for ever for a request of a closed socket when it frees its environment after the event
// loop has ended (node::Environment::CleanupHandles, by perf, in one run of six of a test of gateways in a ring).
// `process.exit` frees nothing. The first time tap ends its tests; what that sets going keeps the loop alive.
let ended = false
if (isMainThread) {
  process.on('beforeExit', () => {
    if (ended) process.exit()
    ended = true
    setImmediate(() => {})
  })
}
