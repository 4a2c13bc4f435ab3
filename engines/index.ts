/**
 * Reference engines as a library: start one in this process, or implement {@link EngineService} and serve it with
 * the same api_server.
 */
export { ROLE_TO_WIRE } from '../adapters/wire/roles.ts'
export { EngineCounters, GAUGES } from './service/engine-service.ts'
export type {
  ChatAnswer, ChatCall, EngineBackend, EngineInfo, EngineLog, EngineRole, EngineService, GaugeName, LatencyName, P2PLinks, ServedModel
} from './service/engine-service.ts'
export type { CurveKeys, EngineOptions, MediaPolicy } from './service/engine-options.ts'
export { ENGINE_ERROR_STATUS, EngineError, errorBody, type EngineErrorCode } from './service/errors.ts'
export { NotAvailableError, shippedModel, startApiServer, startEngine } from './server/index.ts'
export type { ApiServer, ApiServerOptions, StartEngineOptions } from './server/index.ts'
