/** Pure functions from (request, registry snapshot, options) to a plan. */
export { planRequest } from './planner.ts'
export { rank, weight } from './rendezvous.ts'
export type { Plan, PlanOptions, Refusal, RefusalCode, RequestView, Topology, Undivided } from './types.ts'
