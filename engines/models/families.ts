import { ModelError, type Json, type ModelFamily } from './family.ts'
import { internvl } from './internvl.ts'
import { qwen2vl } from './qwen2-vl.ts'

/** Every model family engines know. */
export const families: readonly ModelFamily[] = [internvl, qwen2vl]

/** @throws ModelError when no family takes this `model_type`. */
export function familyFor (config: Json): ModelFamily {
  const type = config.model_type
  const family = families.find(f => f.modelTypes.includes(String(type)))
  if (family !== undefined) return family
  const known = families.flatMap(f => f.modelTypes).join(', ')
  throw new ModelError(`config.json: model_type ${JSON.stringify(type)} is none of those engines know (${known})`)
}
