/** GET /metrics: true without any SDK in the process, and with several gateways in it. Loaded only where the route is mounted. */
import { expose, type Exposition } from '../../adapters/wire/exposition.ts'
import { processMetrics } from '../../adapters/wire/process-metrics.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { familiesOf, type MetricsSource } from './instruments.ts'

export interface MetricsPage {
  /** Reads every number at this moment. @param accept the scraper's header: OpenMetrics has exemplars */
  read (accept: string | undefined): Exposition
  close (): void
}

export function metricsPage (source: MetricsSource): MetricsPage {
  const process = processMetrics({ component: 'gateway', version: VERSION })
  const families = [...familiesOf(source), ...process.families]
  return { read: accept => expose(families, accept), close: process.close }
}
