/** What a node does. */
export type Role = 'encoder' | 'prefill' | 'decode' | 'hybrid'

/** LMDeploy's EngineRole; `encoder` is 4 as in its encoder disaggregation proof of concept (InternLM/lmdeploy#4047). */
export const ROLE_TO_WIRE: Readonly<Record<Role, number>> = { hybrid: 1, prefill: 2, decode: 3, encoder: 4 }
export const ROLE_FROM_WIRE: Readonly<Record<number, Role>> = { 1: 'hybrid', 2: 'prefill', 3: 'decode', 4: 'encoder' }
