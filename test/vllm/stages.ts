/** Where time went, by the histograms of the gateway and of vLLM's servers. */

/** Sums and counts of histograms until now, by name and, at the gateway, stage. */
export type Times = ReadonlyMap<string, { readonly sum: number, readonly count: number }>

/** What is read, and how it is called in a report. */
const NAMES: Readonly<Record<string, string>> = {
  'epd.stage.duration': '',
  epd_stage_duration_seconds: '',
  'vllm:request_queue_time_seconds': 'queue',
  'vllm:request_prefill_time_seconds': 'prefill',
  'vllm:e2e_request_latency_seconds': 'whole'
}

/** Reads a server's `/metrics`; empty where it has none. */
export async function readTimes (url: string): Promise<Times> {
  const times = new Map<string, { sum: number, count: number }>()
  const answer = await fetch(`${url}/metrics`).catch(() => undefined)
  if (answer?.ok !== true) return times
  for (const [, name, kind, labels, value] of (await answer.text()).matchAll(/^([\w:]+)_(sum|count)(\{[^\n]*\})? ([-+.e\d]+)/gm)) {
    const label = NAMES[name!]
    if (label === undefined) continue
    const key = label === '' ? (/stage="([^"]+)"/.exec(labels ?? '')?.[1] ?? name!) : label
    const time = times.get(key) ?? { sum: 0, count: 0 }
    time[kind as 'sum' | 'count'] += Number(value)
    times.set(key, time)
  }
  return times
}

/** Mean milliseconds between two readings, for example `encode 820, generate 310`. */
export function means (before: Times, after: Times): string {
  return [...after].flatMap(([key, { sum, count }]) => {
    const since = before.get(key) ?? { sum: 0, count: 0 }
    return count === since.count ? [] : [`${key} ${((sum - since.sum) * 1_000 / (count - since.count)).toFixed(0)}`]
  }).join(', ')
}

export interface Pulled { readonly tokens: number, readonly of: number }

/** Prompt tokens whose KV blocks these servers have pulled until now instead of computing them, of those that they asked for. */
export async function pulledBy (urls: readonly string[]): Promise<Pulled> {
  const texts = await Promise.all(urls.map(async url => await fetch(`${url}/metrics`).then(async answer => await answer.text(), () => '')))
  const sum = (name: string): number => texts.flatMap(text => [...text.matchAll(new RegExp(`^vllm:external_prefix_cache_${name}_total\\{[^\\n]*\\} ([-+.e\\d]+)`, 'gm'))])
    .reduce((all, [, value]) => all + Number(value), 0)
  return { tokens: sum('hits'), of: sum('queries') }
}
