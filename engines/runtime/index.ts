export { parseDevice } from './device.ts'
export { ProgramError } from './messages.ts'
export { fromFloat16, toFloat16 } from './float16.ts'
export { ProgramHost } from './program-host.ts'
export { threadsPerEngine } from './device.ts'
export { transferring } from './types.ts'
export type {
  CallOptions, CallResult, CreateProgram, Device, MethodArgs, MethodValue, OpenSessionOptions, ProgramContext, ProgramHostOptions,
  ProgramMethods, Session, TensorArrays, TensorData, TensorSpec, TensorType, Transferring
} from './types.ts'
