/** Pure functions from (request, registry snapshot, options) to a plan. */
export { byAffinity } from './encoders.ts'
export { ownTokens, planRequest, visionTokens } from './planner.ts'
export { byLoad, POLICIES, type Policy, type PolicyName, type PolicyRequest } from './policy.ts'
export { rank } from './rendezvous.ts'
export { ANSWER_TOKENS, promptTokens, viewRequest, workOf, type RequestView, type SingleNode } from './request.ts'
export { workAt, workAtEncoders } from './stage-times.ts'
export { TimeLine, type StageTimes } from './time-line.ts'
export type { Plan, PlanOptions, Refusal, RefusalCode, Topology } from './types.ts'
