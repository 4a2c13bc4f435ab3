import { setTimeout as delay } from 'node:timers/promises'
import type { TraceSummary } from '../traces/summary.ts'
import type { TraceView } from '../traces/view.ts'
import { UnreachableError } from './gateway-client.ts'

export type Wanted = (trace: Pick<TraceSummary, 'status' | 'failures'>) => boolean

export interface FollowOptions {
  /** Reads from the gateway; undefined for 404. @throws UnreachableError while it is down */
  readonly get: <T extends object>(path: string) => Promise<T | undefined>
  /** Query of GET /epd/traces. */
  readonly filter: URLSearchParams
  /** Which of them are shown. @default all */
  readonly wanted?: Wanted
  readonly show: (trace: TraceView) => void
  /** The gateway went down, and came back. */
  readonly onLost: (err: Error) => void
  readonly onFound: () => void
  readonly signal: AbortSignal
  /** How long after its end a trace has all its spans. */
  readonly settledMs: number
}

const POLL_MS = 300
/** Between two tries while the gateway is down. */
const AWAY_MS = 1_000
/** Traces read in each poll. When more come between two polls, the oldest are skipped. */
const LIMIT = 200

/**
 * Shows each request once it is complete, oldest first, from now until the signal aborts. Waits for a gateway that
 * restarts; rejects when the gateway is down at the start.
 */
export async function follow ({ get, filter, wanted = () => true, show, onLost, onFound, signal, settledMs }: FollowOptions): Promise<void> {
  filter.set('limit', String(LIMIT))
  const list = async (): Promise<TraceSummary[]> => (await get<{ traces: TraceSummary[] }>(`/epd/traces?${filter}`))?.traces ?? []
  let seen = new Set((await list()).map(trace => trace.traceId))
  const poll = async (): Promise<void> => {
    const traces = await list()
    for (const { traceId, partial, start, durationMs } of [...traces].reverse()) {
      if (seen.has(traceId) || partial || Date.now() - Date.parse(start) - durationMs < settledMs) continue
      const trace = await get<TraceView>(`/epd/traces/${traceId}`)
      seen.add(traceId)
      if (trace !== undefined && wanted(trace) && !signal.aborted) show(trace)
    }
    // A trace that left the list never comes back.
    if (traces.length > 0) seen = new Set(traces.map(trace => trace.traceId).filter(id => seen.has(id)))
  }
  let away = false
  while (!signal.aborted) {
    await delay(away ? AWAY_MS : POLL_MS, undefined, { signal }).catch(() => {})
    if (signal.aborted) break
    try {
      await poll()
      if (away) onFound()
      away = false
    } catch (err) {
      if (!(err instanceof UnreachableError)) throw err
      if (!away) onLost(err)
      away = true
    }
  }
}
