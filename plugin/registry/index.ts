/** Nodes, their health, their load and the links between them. */
export { Registry } from './registry.ts'
export type {
  AddResult, BreakerState, Breakers, LinkState, LinkView, NodeLoad, NodeSnapshot, NodeSpec, NodeState, NodeStatus,
  RegistryApi, RegistryOptions, RegistrySnapshot, Ticket
} from './types.ts'
