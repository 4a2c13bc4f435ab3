/** Nodes, their health, their load and the links between them. */
export { canExchange, sameEngine, sameFingerprint } from './links.ts'
export { usableOf } from './load.ts'
export { remembered, those } from './remembered.ts'
export { Registry } from './registry.ts'
export type { AddResult, NodeChanges, NodeStatus, Registrant, RegistryApi, RegistryOptions, SavedNodes, Ticket } from './api.ts'
export type { BreakerState, Breakers, LinkState, LinkView, NodeLoad, NodeSnapshot, NodeState, RegistrySnapshot, Verdict } from './types.ts'
