/** The assembly of an engine process: which engine for which role, behind the api_server. */
import { fileURLToPath } from 'node:url'
import type { EngineOptions } from '../service/engine-options.ts'
import type { EngineLog, EngineService } from '../service/engine-service.ts'
import { assertInstalled } from '../service/optional.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { startApiServer, type ApiServer, type ApiServerOptions } from './api-server.ts'

export { startApiServer, type ApiServer, type ApiServerOptions } from './api-server.ts'

export interface StartEngineOptions extends Omit<EngineOptions, 'engineId' | 'log'>, Omit<ApiServerOptions, 'createEngine' | 'host' | 'version'> {}

/** The role and the backend do not go together: a usage error. */
export class NotAvailableError extends Error {
  override readonly name = 'NotAvailableError'
}

/** Folder of the shipped model, which the build does not copy to dist/. */
export function shippedModel (): string {
  return fileURLToPath(new URL('../../../engines/models/tiny-internvl', import.meta.url))
}

/** @throws NotAvailableError for roles and backends that do not go together */
export function assertAvailable ({ role, backend }: Pick<EngineOptions, 'role' | 'backend'>): void {
  if (backend === 'turbomind' && role === 'encoder') throw new NotAvailableError('TurboMind is a language model engine: start encoders with --backend pytorch')
  if (backend === 'turbomind' && role !== 'hybrid') throw new NotAvailableError(`LMDeploy's TurboMind has no disaggregated prefill/decode, so no role ${role}: use --role hybrid, or --backend pytorch`)
}

/** Starts an engine and its api_server; resolves when requests can be served. */
export async function startEngine (options: StartEngineOptions): Promise<ApiServer> {
  assertAvailable(options)
  assertInstalled()
  return await startApiServer({
    ...options,
    version: VERSION,
    createEngine: (engineId, log) => createEngine({ ...options, engineId, log })
  })
}

/** Loads only the code of the engine that it makes. */
async function createEngine (options: EngineOptions & { readonly log: EngineLog }): Promise<EngineService> {
  if (options.role === 'encoder') return await (await import('../encoder/index.ts')).createEncoderEngine(options)
  if (options.backend === 'turbomind') return await (await import('../turbomind/index.ts')).createTurbomindEngine(options)
  return await (await import('../llm/index.ts')).createLlmEngine(options)
}
