/** From a plan to an answer: encode, prefill, generate, deliver, and the one way out. */
export { serve, type Served } from './run.ts'
export { Admission } from './admission.ts'
export { beginAnswer } from './answer.ts'
export type { Answer, Delivery } from './answer-stream.ts'
export { Stats } from './stats.ts'
export { InFlight, type Cancellable } from './in-flight.ts'
export type { Core, Deliver, GatewayRequest } from './types.ts'
