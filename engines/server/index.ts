export { startApiServer, type ApiServer, type ApiServerOptions } from './api-server.ts'
export { assertAvailable, NotAvailableError, shippedModel, startEngine, type StartEngineOptions } from './start.ts'
