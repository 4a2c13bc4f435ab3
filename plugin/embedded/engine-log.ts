import type { Log } from '../../adapters/adapter.ts'

const WARN = 40
const ERROR = 50

/**
 * Passes a line of an engine's log on: warnings and errors as such, with all they say, the rest for who debugs. What is
 * no JSON (a runtime's own chatter) is among the rest.
 */
export function passOn (log: Log, engine: string, line: string): void {
  const { level, msg, time: _time, pid: _pid, hostname: _hostname, ...facts } = recordOf(line)
  if (typeof level !== 'number' || level < WARN || typeof msg !== 'string') log.debug({ engine }, line)
  else if (level < ERROR) log.warn({ engine, ...facts }, msg)
  else log.error({ engine, ...facts }, msg)
}

function recordOf (line: string): Record<string, unknown> {
  if (!line.startsWith('{')) return {}
  try {
    return JSON.parse(line) as Record<string, unknown>
  } catch {
    return {}
  }
}
