/** What follows from the nodes alone is found once, until they change: every request asks for it. */
import type { NodeSnapshot } from './types.ts'

/** A pure function that remembers its last answer for each `key`. */
export function remembered<K extends object, R extends readonly unknown[], A> (compute: (key: K, ...rest: R) => A): typeof compute {
  const known = new WeakMap<K, { readonly rest: R, readonly answer: A }>()
  return (key, ...rest) => {
    const last = known.get(key)
    if (last?.rest.every((one, i) => one === rest[i]) === true) return last.answer
    const answer = compute(key, ...rest)
    known.set(key, { rest, answer })
    return answer
  }
}

const lists = new WeakMap<readonly NodeSnapshot[], readonly NodeSnapshot[]>()

/** Those of `pool` for which `condition` holds: the same list as the last time while it has the same nodes. */
export function those (pool: readonly NodeSnapshot[], condition: (node: NodeSnapshot) => boolean): readonly NodeSnapshot[] {
  if (pool.every(condition)) return pool
  const list = pool.filter(condition)
  const last = lists.get(pool)
  if (last?.length === list.length && list.every((node, i) => node === last[i])) return last
  lists.set(pool, list)
  return list
}
