/** LMDeploy's control protocol between a proxy and api_servers, with the members that our engines add. */

export const MIGRATION_PROTOCOL = { tcp: 1, rdma: 2 } as const
/** LMDeploy's DistServeConnectionStatus. */
export const CONNECTION_STATUS = { success: 1, fail: 2 } as const

/** `engine` of our engines' engine_info; LMDeploy's has no such member. */
export const OUR_ENGINE = 'fastify-epd'

/** Body of POST /nodes/add, with which an api_server registers. */
export interface NodeRegistration {
  readonly url: string
  /** `role`: LMDeploy's integer. */
  readonly status: { readonly role: number, readonly models: readonly string[] }
}

/** Body of GET /distserve/engine_info: LMDeploy's members, then ours. */
export interface EngineInfo {
  readonly tp_size: number
  readonly ep_size: number
  readonly dp_size: number
  readonly pp_size: number | null
  readonly dp_rank: number
  /** Tokens of one KV block (of one feature block in an encoder). */
  readonly block_size: number
  readonly num_cpu_blocks: number
  readonly num_gpu_blocks: number
  readonly engine: typeof OUR_ENGINE
  readonly version: string
  readonly backend: 'pytorch' | 'turbomind'
  /** LMDeploy's integer. */
  readonly role: number
  readonly epoch: number
  readonly model: string
  readonly fingerprint: string
  /** `full`: encodes media itself; `features`: media only as encoder results; `none`: no media. */
  readonly vision: 'full' | 'features' | 'none'
  readonly produces: readonly string[]
  readonly accepts: readonly string[]
  /** It takes up what an encoder offers while it encodes. */
  readonly pulls_ahead?: boolean | undefined
  /** Shape of its feature blocks, and of its KV blocks. */
  readonly feature?: object | undefined
  readonly kv?: object | undefined
}

/** How blocks are to travel. */
export interface TransferTerms {
  readonly protocol: number
  readonly tcp_config: object | null
  readonly rdma_config: object | null
  readonly nvlink_config: object | null
}

/** Body of POST /distserve/p2p_initialize. */
export interface P2PInitialize extends TransferTerms {
  readonly local_engine_id: string
  readonly local_engine_config: object
  readonly remote_engine_id: string
  readonly remote_engine_config: object
  readonly rank: null
}

/** An engine's own endpoints, which the gateway takes to the other end as they are. */
export interface P2PEndpoints {
  readonly status: typeof CONNECTION_STATUS.success
  readonly engine_endpoint_info: { readonly zmq_address: string }
  /** One entry for each rank. */
  readonly kvtransfer_endpoint_info: ReadonlyArray<{ readonly protocol: number, readonly endpoint_info: string }>
}

/** Body of POST /distserve/p2p_connect. The infos are the other end's {@link P2PEndpoints}. */
export interface P2PConnect {
  readonly protocol: number
  readonly remote_engine_id: string
  readonly remote_engine_endpoint_info: unknown
  readonly remote_kvtransfer_endpoint_info: unknown
}

/** A pair that can't work together, answered with HTTP status 200. `code` and `message` are ours; REFUSED: another try does not help. */
export interface P2PRefusal {
  readonly status: typeof CONNECTION_STATUS.fail
  readonly code: string
  readonly message: string
}
