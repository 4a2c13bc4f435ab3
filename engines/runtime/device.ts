import { availableParallelism } from 'node:os'
import type { Device } from './types.ts'

/** @throws RangeError when `text` is none of cpu, cuda, cuda:N. */
export function parseDevice (text: string): Device {
  if (text === 'cpu' || text === 'cuda' || /^cuda:\d{1,3}$/.test(text)) return text as Device
  throw new RangeError(`unknown device "${text}": use cpu, cuda or cuda:N`)
}

/** Which CUDA device, undefined for the CPU. */
export function cudaIndex (device: Device): number | undefined {
  return device === 'cpu' ? undefined : Number(device.split(':')[1] ?? 0)
}

/**
 * Threads for the sessions of one engine, when `sharing` engines run on this machine (option, or EPD_ENGINES_PER_HOST):
 * each takes its share of the cores, at least one. Left to themselves every session would take all of them.
 */
export function threadsPerEngine (threads?: number, sharing = Number(process.env.EPD_ENGINES_PER_HOST ?? 1)): number {
  if (threads !== undefined && threads > 0) return Math.floor(threads)
  const engines = Number.isFinite(sharing) && sharing >= 1 ? sharing : 1
  return Math.max(1, Math.floor(availableParallelism() / engines))
}
