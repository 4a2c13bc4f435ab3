/** Nodes, their health, their load and the links between them. */
export { canExchange, sameFingerprint } from './links.ts'
export { Registry } from './registry.ts'
export { usable } from './snapshot.ts'
export type {
  AddResult, BreakerState, Breakers, LinkState, LinkView, NodeLoad, NodeSnapshot, NodeSpec, NodeState, NodeStatus,
  RegistryApi, RegistryOptions, RegistrySnapshot, Ticket
} from './types.ts'
