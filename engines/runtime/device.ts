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
