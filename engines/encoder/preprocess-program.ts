/** Runs in a worker of its own: pictures become vision inputs. sharp decodes in libuv's threads, normalising happens here. */
import { requireOptional } from '../service/optional.ts'
import { familyFor } from '../models/families.ts'
import type { ModelSource, PixelSettings, PreparedItem } from '../models/family.ts'
import { transferring, type CreateProgram, type Transferring } from '../runtime/types.ts'

export interface PrepareArgs {
  readonly bytes: Uint8Array
  readonly settings: PixelSettings
}

export type PreprocessMethods = {
  prepare (args: PrepareArgs): Promise<Transferring<PreparedItem>>
}

export const create: CreateProgram<ModelSource, PreprocessMethods> = async ({ data: source }) => {
  const model = familyFor(source.config).open(source)
  const sharp = requireOptional('sharp')
  // One thread a picture: several pictures are decoded at once instead. libvips' cache would only keep pictures that are not asked for again.
  sharp.concurrency(1)
  sharp.cache(false)
  return {
    prepare: async ({ bytes, settings }) => {
      const item = await model.prepare(bytes, settings)
      return transferring(item, item.inputs.map(({ tensor }) => tensor.data.buffer as ArrayBuffer))
    }
  }
}
