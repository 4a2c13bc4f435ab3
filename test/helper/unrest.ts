import { metric } from './metrics.ts'

/** Why an engine with these metrics is not idle: open leases, blocks that are neither free nor cached, live sequences. Undefined when it is. */
export function unrestOf (metrics: string): string | undefined {
  const value = (name: string): number => metric(metrics, name) ?? 0
  if (value('epd_leases_open') !== 0) return `${value('epd_leases_open')} leases are open`
  for (const pool of ['feature', 'kv']) {
    const [capacity, free, cached] = ['capacity', 'free', 'cached'].map(what => value(`epd_${pool}_blocks_${what}`)) as [number, number, number]
    if (free + cached !== capacity) return `${pool} blocks: ${free} free + ${cached} cached of ${capacity}`
  }
  return metrics.split('\n').find(line => line.startsWith('epd_sequences{') && !line.endsWith(' 0'))
}
