/** What a server was busy with: its card (by nvidia-smi) and its threads (by /proc). */
import { spawn } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { createInterface } from 'node:readline'

/** Milliseconds between two samples. */
const EVERY_MS = 500

export class Cards {
  readonly #samples: Array<{ at: number, card: string, busy: number }> = []
  readonly #child = spawn('nvidia-smi', ['--query-gpu=index,utilization.gpu', '--format=csv,noheader,nounits', `-lms=${EVERY_MS}`], { stdio: ['ignore', 'pipe', 'ignore'] })

  /** Samples until it is closed; without nvidia-smi there are no samples. */
  constructor () {
    this.#child.on('error', () => {})
    createInterface({ input: this.#child.stdout }).on('line', line => {
      const [card, busy] = line.split(',').map(part => part.trim())
      if (card !== undefined && busy !== undefined && busy !== '') this.#samples.push({ at: performance.now(), card, busy: Number(busy) })
    })
  }

  /** Share of time, in percent, in which a kernel ran on the card since then; undefined without samples. */
  busy (card: string, since: number): number | undefined {
    const samples = this.#samples.filter(sample => sample.card === card && sample.at >= since)
    return samples.length === 0 ? undefined : samples.reduce((sum, { busy }) => sum + busy, 0) / samples.length
  }

  close (): void {
    this.#child.kill()
  }
}

/** Of `sysconf(_SC_CLK_TCK)`, the same on all Linux machines that Node runs on. */
const TICKS_A_SECOND = 100

/** CPU seconds of each thread of a process group until now; empty where there is no /proc. */
export function threadSeconds (group: number): Map<string, number> {
  const seconds = new Map<string, number>()
  for (const pid of list('/proc').filter(name => /^\d+$/.test(name))) {
    if (fieldsOf(`/proc/${pid}/stat`)[2] !== String(group)) continue
    for (const thread of list(`/proc/${pid}/task`)) {
      const fields = fieldsOf(`/proc/${pid}/task/${thread}/stat`)
      seconds.set(thread, (Number(fields[11]) + Number(fields[12])) / TICKS_A_SECOND)
    }
  }
  return seconds
}

/** Share of a core, in percent, of the busiest thread between two readings. */
export function busiest (before: ReadonlyMap<string, number>, after: ReadonlyMap<string, number>, ms: number): number {
  return Math.max(0, ...[...after].map(([thread, seconds]) => (seconds - (before.get(thread) ?? 0)) * 100_000 / ms))
}

/** What follows the command's name in a stat file, from the state on: state, parent, group ... */
function fieldsOf (file: string): string[] {
  try {
    return readFileSync(file, 'utf8').replace(/^.*\) /s, '').split(' ')
  } catch {
    return []
  }
}

function list (folder: string): string[] {
  try {
    return readdirSync(folder)
  } catch {
    return []
  }
}
