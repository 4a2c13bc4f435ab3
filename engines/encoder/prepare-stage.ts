import type { Context } from '@opentelemetry/api'
import type { LoadedModel, PixelSettings, PreparedItem } from '../models/index.ts'
import type { EngineLog } from '../service/engine-service.ts'
import { ProgramHost } from '../runtime/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { PreprocessMethods } from './preprocess-program.ts'
import { inSpan } from './media-error.ts'

/** Pictures decoded at once: libuv has four threads. */
export const DECODE_CONCURRENCY = 4

/** Bytes in a buffer of their own can be moved to the worker; others are copied. */
function transferList (bytes: Uint8Array): ArrayBuffer[] {
  const { buffer } = bytes
  return buffer instanceof ArrayBuffer && bytes.byteLength === buffer.byteLength ? [buffer] : []
}

/** Pictures to vision inputs, in a worker. */
export class PrepareStage {
  readonly #host: ProgramHost<PreprocessMethods>
  readonly #model: LoadedModel
  #active = 0

  private constructor (host: ProgramHost<PreprocessMethods>, model: LoadedModel) {
    this.#host = host
    this.#model = model
  }

  static async open (model: LoadedModel, log?: EngineLog): Promise<PrepareStage> {
    const program = new URL('./preprocess-program.js', import.meta.url)
    return new PrepareStage(await ProgramHost.open({ program, device: 'cpu', threads: 1, data: model.source, name: 'preprocess', concurrency: DECODE_CONCURRENCY, log }), model)
  }

  get problem (): string | undefined {
    return this.#host.problem
  }

  /** Items being prepared, or next in line for it. */
  get active (): number {
    return this.#active
  }

  /** `bytes` may be moved away. @throws ProgramError named PictureError, or the signal's reason. */
  async prepare (bytes: Uint8Array, settings: PixelSettings, context: Context, signal: AbortSignal): Promise<PreparedItem> {
    this.#active++
    try {
      return await inSpan(SPAN.enginePreprocess, context, { [ATTR.requestModel]: this.#model.name, [ATTR.bytes]: bytes.byteLength }, async span => {
        const { value } = await this.#host.call('prepare', { bytes, settings }, { signal, transfer: transferList(bytes) })
        signal.throwIfAborted()
        span.setAttribute(ATTR.tokens, value.numTokens)
        return value
      })
    } finally {
      this.#active--
    }
  }

  close (): Promise<void> {
    return this.#host.close()
  }
}
