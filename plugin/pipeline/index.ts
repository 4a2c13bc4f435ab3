/** From a plan to an answer: encode, generate, deliver, and the one way out. */
export { serve, type Served } from './run.ts'
export { Admission } from './admission.ts'
export { Deadlines } from './deadlines.ts'
export { Stats } from './stats.ts'
export type { AbortSignalLike, Cancellable, Core, Deliver, Delivery, GatewayRequest } from './types.ts'
