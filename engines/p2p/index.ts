export { parseEndpoint } from './endpoint.ts'
export { P2PError, type P2PErrorCode } from './types.ts'
export { P2PNode } from './node.ts'
export type {
  CallOptions, CurveKeys, Dtype, FeatureShape, KvShape, LeaseName, P2PEndpointInfo, P2PLog, P2PNodeOptions, P2PPeer, P2PPool,
  PoolInfo, PullOptions, PullResult, ServedPull, Transport
} from './types.ts'
