/** From a plan to an answer: encode, prefill, generate, deliver, and the one way out. */
export { serve, type Served } from './run.ts'
export { Admission } from './admission.ts'
export { beginAnswer, isEventStream, type Answer, type Delivery } from './answer.ts'
export { Stats } from './stats.ts'
export type { Cancellable, Core, Deliver, GatewayRequest } from './types.ts'
