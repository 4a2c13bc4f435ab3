import { Worker } from 'node:worker_threads'

/**
 * A worker thread that starts bare. What the process preloads (`--import`, `--require`, also by NODE_OPTIONS), most often
 * instrumentation, would start anew in each of its threads: it has nothing to see in these, and costs them half a second.
 */
export function bareWorker (program: URL, name: string, workerData: unknown): Worker {
  const { NODE_OPTIONS: _, ...env } = process.env
  return new Worker(program, { name, workerData, execArgv: [], env })
}
