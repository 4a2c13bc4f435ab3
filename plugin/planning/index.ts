/** Pure functions from (request, registry snapshot, options) to a plan. */
export { byAffinity } from './encoders.ts'
export { planRequest } from './planner.ts'
export { byLoad, POLICIES, type Policy, type PolicyName, type PolicyRequest } from './policy.ts'
export { rank } from './rendezvous.ts'
export { ANSWER_TOKENS, promptTokens, viewRequest, workOf, type RequestView, type SingleNode } from './request.ts'
export type { Plan, PlanOptions, Refusal, RefusalCode, Topology } from './types.ts'
