/** Optional peers of the package that options need: without one, the first request would find out. */
import zlib from 'node:zlib'
import type { OptionsProblem } from '../errors.ts'
import type { EpdOptions, LimitOptions, RateOptions } from './schema.ts'

interface Needy extends Readonly<Required<Pick<EpdOptions, 'discover'>>> {
  readonly limits: LimitOptions
  readonly rates: RateOptions
}

export function missingPackages ({ discover, limits, rates }: Needy): OptionsProblem[] {
  return [
    ...discover.flatMap(({ kubernetes }, i) => kubernetes === undefined ? [] : missing('@kubernetes/client-node', `/discover/${i}/kubernetes`, `discover[${i}].kubernetes`)),
    ...(rates.redis === undefined ? [] : missing('ioredis', '/rates/redis', 'rates.redis')),
    ...(!limits.zstd || 'createZstdDecompress' in zlib ? [] : missing('zstddec/stream', '/limits/zstd', `limits.zstd with Node.js ${process.versions.node}`))
  ]
}

function missing (module: string, instancePath: string, name: string): OptionsProblem[] {
  // A bundle may have the package in itself.
  if (typeof import.meta.resolve !== 'function') return []
  try {
    import.meta.resolve(module)
    return []
  } catch {
    return [{ instancePath, message: `${name} needs the package ${module.replace('/stream', '')}: npm install ${module.replace('/stream', '')}` }]
  }
}
