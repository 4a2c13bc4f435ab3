import { setTimeout as delay } from 'node:timers/promises'
import type { TraceSummary, TraceView } from '../telemetry/trace-view.ts'

export interface FollowOptions {
  /** Reads from the gateway; undefined for 404. */
  readonly get: <T>(path: string) => Promise<T | undefined>
  /** Query of GET /epd/traces. */
  readonly filter: URLSearchParams
  readonly show: (trace: TraceView) => void
  readonly signal: AbortSignal
  /** How long after its end a trace has all its spans. */
  readonly settledMs: number
}

const POLL_MS = 300
/** Traces looked at in each poll; more than that in between are passed over. */
const LIMIT = 200

/** Shows each request once it is complete, oldest first, from now on and until the signal aborts. */
export async function follow ({ get, filter, show, signal, settledMs }: FollowOptions): Promise<void> {
  filter.set('limit', String(LIMIT))
  const list = async (): Promise<TraceSummary[]> => (await get<{ traces: TraceSummary[] }>(`/epd/traces?${filter}`))?.traces ?? []
  let seen = new Set((await list()).map(trace => trace.traceId))
  while (!signal.aborted) {
    await delay(POLL_MS, undefined, { signal }).catch(() => {})
    const traces = signal.aborted ? [] : await list()
    for (const { traceId, partial, start, durationMs } of [...traces].reverse()) {
      if (seen.has(traceId) || partial || Date.now() - Date.parse(start) - durationMs < settledMs) continue
      seen.add(traceId)
      const trace = await get<TraceView>(`/epd/traces/${traceId}`)
      if (trace !== undefined && !signal.aborted) show(trace)
    }
    // What has left the list never comes back.
    if (traces.length > 0) seen = new Set(traces.map(trace => trace.traceId).filter(id => seen.has(id)))
  }
}
