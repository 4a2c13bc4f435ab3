import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { ProgramHost, parseDevice, type Device } from '../../engines/runtime/index.ts'
import { GraphWriter } from '../helper/onnx.ts'

export interface GpuOptions {
  readonly device: Device
  /** A few rounds instead of many. */
  readonly quick: boolean
  /** Layers of the timed encoder; fewer only to try the script out. */
  readonly layers: number
  /** Side of a tile, pixels; likewise. */
  readonly tile: number
}

export function gpuOptions (): GpuOptions {
  const { values } = parseArgs({ options: { device: { type: 'string', default: 'cuda' }, quick: { type: 'boolean', default: false }, layers: { type: 'string', default: '24' }, tile: { type: 'string', default: '448' } } })
  return { device: parseDevice(values.device), quick: values.quick, layers: Number(values.layers), tile: Number(values.tile) }
}

/** A folder that is gone when the process ends. */
export function scratchFolder (): string {
  const dir = mkdtempSync(join(tmpdir(), 'fastify-epd-gpu-'))
  process.once('exit', () => { rmSync(dir, { recursive: true, force: true }) })
  return dir
}

/** Opens a tiny session on the device: says in one line why not, and ends the process with 1. */
export async function requireDevice (device: Device, dir: string): Promise<void> {
  const graph = new GraphWriter()
  const x = graph.input({ name: 'pixel_values', type: 'float32', shape: ['n', 4, 1] })
  graph.output({ name: 'image_features', type: 'float32', shape: ['n', 4, 1] }, graph.node('Add', [x, x]))
  const path = join(dir, 'probe.onnx')
  graph.save(path)
  try {
    const host = await ProgramHost.open({
      program: new URL('../../engines/encoder/vision-program.js', import.meta.url), device, threads: 1, data: { path, hiddenSize: 1, blockTokens: 4 }, pools: { feature: new SharedArrayBuffer(16) }
    })
    await host.close()
  } catch (err) {
    console.error(`no CUDA here: ${err instanceof Error ? err.message : String(err)}`)
    process.exit(1)
  }
}
