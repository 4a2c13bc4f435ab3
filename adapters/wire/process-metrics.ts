/** What a process says of itself: its build, memory, CPU, files, event loop and garbage collection. */
import { readdirSync, readFileSync } from 'node:fs'
import { getHeapStatistics } from 'node:v8'
import { constants, monitorEventLoopDelay, performance, PerformanceObserver, type PerformanceEntry } from 'node:perf_hooks'
import type { Family } from './exposition.ts'
import { Histogram, type Labels, type Sample } from './series.ts'

export interface ProcessMetrics {
  readonly families: readonly Family[]
  close (): void
}

/** Of the event loop's timer: what a delay is beyond, in milliseconds. */
const RESOLUTION = 10
/** Delays are those of this time at least, in milliseconds, so that two scrapers do not halve each other's. */
const WINDOW = 10_000
const GC_BOUNDS = [0.001, 0.01, 0.1, 1]
const GC_TYPES: Readonly<Record<number, string>> = {
  [constants.NODE_PERFORMANCE_GC_MAJOR]: 'major',
  [constants.NODE_PERFORMANCE_GC_MINOR]: 'minor',
  [constants.NODE_PERFORMANCE_GC_INCREMENTAL]: 'incremental',
  [constants.NODE_PERFORMANCE_GC_WEAKCB]: 'weakcb'
}

/** @param build labels of `epd_build_info` */
export function processMetrics (build: Labels): ProcessMetrics {
  const { delays, close: closeDelays } = loopDelays()
  const { pauses, close: closePauses } = gcPauses()
  const families: Family[] = [
    gauge('epd.build.info', 'Always 1; which build runs is in the labels.', () => [{ labels: { ...build, node_version: process.version }, value: 1 }]),
    gauge('process.start_time', 'When the process started, Unix time.', one(() => performance.timeOrigin / 1_000), 's'),
    { ...gauge('process.cpu', 'CPU time of the process.', cpuSeconds, 's'), type: 'counter' },
    gauge('process.resident_memory', 'Resident memory.', one(() => process.memoryUsage.rss()), 'By'),
    gauge('process.open_fds', 'Open file descriptors. Linux only.', openFiles),
    gauge('process.max_fds', 'The most file descriptors that may be open. Linux only.', maxFiles),
    gauge('v8js.memory.heap.used', 'JavaScript heap in use.', one(() => getHeapStatistics().used_heap_size), 'By'),
    gauge('v8js.memory.heap.limit', 'The most that the JavaScript heap may grow to.', one(() => getHeapStatistics().heap_size_limit), 'By'),
    gauge('nodejs.memory.external', 'Memory of Buffers and other objects outside the heap.', one(() => process.memoryUsage().external), 'By'),
    { name: 'v8js.gc.duration', type: 'histogram', unit: 's', help: 'Pauses for garbage collection, by type.', read: () => pauses.distributions() },
    { ...gauge('nodejs.eventloop.time', 'Time of the event loop, active and idle: the rate of the active part is its utilisation.', loopTimes, 's'), type: 'counter' },
    gauge('nodejs.eventloop.delay', 'How late the event loop was: median, 99th percentile and longest of 10 seconds or more.', delays, 's')
  ]
  return { families, close: () => { closeDelays(); closePauses() } }
}

function gauge (name: string, help: string, read: () => Sample[], unit?: string): Family {
  return { name, type: 'gauge', help, unit, read }
}

function one (read: () => number): () => Sample[] {
  return () => [{ labels: {}, value: read() }]
}

function cpuSeconds (): Sample[] {
  const { user, system } = process.cpuUsage()
  return [{ labels: {}, value: (user + system) / 1e6 }]
}

function openFiles (): Sample[] {
  try {
    return [{ labels: {}, value: readdirSync('/proc/self/fd').length }]
  } catch {
    return []
  }
}

function maxFiles (): Sample[] {
  try {
    const limit = /^Max open files +(\d+)/m.exec(readFileSync('/proc/self/limits', 'utf8'))?.[1]
    return limit === undefined ? [] : [{ labels: {}, value: Number(limit) }]
  } catch {
    return []
  }
}

function loopTimes (): Sample[] {
  const { active, idle } = performance.eventLoopUtilization()
  return [['active', active], ['idle', idle]].map(([state, ms]) => ({ labels: { 'nodejs.eventloop.state': String(state) }, value: Number(ms) / 1_000 }))
}

function loopDelays (): { delays: () => Sample[], close: () => void } {
  const histogram = monitorEventLoopDelay({ resolution: RESOLUTION })
  histogram.enable()
  let since = performance.now()
  let last: Sample[] = []
  const seconds = (nanoseconds: number): number => Math.max(0, nanoseconds / 1e9 - RESOLUTION / 1e3)
  const delays = (): Sample[] => {
    if (histogram.count === 0) return last
    last = ([['p50', 50], ['p99', 99], ['max', 100]] as const).map(([stat, percentile]) => ({ labels: { stat }, value: seconds(histogram.percentile(percentile)) }))
    if (performance.now() - since >= WINDOW) {
      histogram.reset()
      since = performance.now()
    }
    return last
  }
  return { delays, close: () => { histogram.disable() } }
}

function gcPauses (): { pauses: Histogram, close: () => void } {
  const pauses = new Histogram(GC_BOUNDS, 'v8js.gc.type')
  const observer = new PerformanceObserver(list => {
    // Of the types of Node.js, only those of its Node.js entries have `detail`.
    for (const { duration, detail } of list.getEntries() as Array<PerformanceEntry & { readonly detail?: { readonly kind?: number } }>) pauses.record(duration / 1_000, [GC_TYPES[detail?.kind ?? 0] ?? 'other'])
  })
  observer.observe({ entryTypes: ['gc'] })
  return { pauses, close: () => { observer.disconnect() } }
}
