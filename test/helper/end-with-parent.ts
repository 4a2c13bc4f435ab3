/**
 * Preloaded (`--import`) into the runner, the test files and the processes they start: ends this process when its parent or
 * its grandparent is gone, so that a test run that is killed leaves nothing behind, however it was killed; and when it has
 * nothing left to do.
 */
import { readFileSync } from 'node:fs'
import { setFlagsFromString } from 'node:v8'
import { isMainThread } from 'node:worker_threads'

// Most of these processes end before optimised code pays for the work: the rooms adapters/ and cli/ take 48 s of CPU by
// default and 42 so, medians of three. Node.js 22 has no such flag.
if (isMainThread && process.version.startsWith('v20.')) setFlagsFromString('--interrupt-budget=1000000')

const INTERVAL_MS = 500

/** Parent of a process; undefined where /proc does not say. */
function parentOf (pid: number): number | undefined {
  try {
    return Number(/^PPid:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1])
  } catch {
    return undefined
  }
}

/** Has it ended, also when nothing has asked yet how? */
function gone (pid: number): boolean {
  try {
    process.kill(pid, 0)
    return /^State:\s*[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
  } catch (err) {
    return (err as NodeJS.ErrnoException).code === 'ESRCH'
  }
}

const parent = process.ppid
const grandparent = parentOf(parent)
/** The process that started this one, or what did, may have ended while this one started: then another one is its parent by now. */
const starter = Number(process.env.EPD_TEST_STARTER ?? parent)
process.env.EPD_TEST_STARTER = String(process.pid)

const end = (): void => { if (process.ppid !== parent || parentOf(parent) !== grandparent || gone(starter)) process.kill(process.pid, 'SIGKILL') }
end()
setInterval(end, INTERVAL_MS).unref()

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
