/** Names that stand for models: each for the first of its list that a request would find a node for. */
import type { Gateway } from '../gateway.ts'

/** What the name stands for now; undefined when it is no alias. */
export function modelFor ({ options: { aliases }, registry }: Gateway, name: string): string | undefined {
  if (!Object.hasOwn(aliases, name)) return undefined
  const targets = [aliases[name]!].flat()
  const { models } = registry.snapshot()
  return targets.find(model => models.includes(model)) ?? targets[0]
}

/** The models that a request would find a node for, and the names that stand for one of them. */
export function servedNames (gateway: Gateway): readonly string[] {
  const { models } = gateway.registry.snapshot()
  const names = Object.keys(gateway.options.aliases).filter(name => !models.includes(name) && models.includes(modelFor(gateway, name)!))
  return [...models, ...names]
}
