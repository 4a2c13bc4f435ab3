import { ROLE_TO_WIRE, type NodeInfo } from '../../adapters/adapter.ts'

const STATUSES: readonly unknown[] = ['initialising', 'healthy', 'draining', 'sleeping'] satisfies Array<NodeInfo['status']>
const VISIONS: readonly unknown[] = ['full', 'features', 'none'] satisfies Array<NodeInfo['vision']>

type Check = (value: unknown) => boolean
const isText: Check = value => typeof value === 'string'
const isNumber: Check = value => typeof value === 'number' && !Number.isNaN(value)
const areTexts: Check = value => Array.isArray(value) && value.every(isText)
const unless = (check: Check): Check => value => value === undefined || check(value)

const CHECKS: ReadonlyArray<readonly [keyof NodeInfo, Check]> = [
  ['status', value => STATUSES.includes(value)],
  ['role', value => isText(value) && Object.hasOwn(ROLE_TO_WIRE, value as string)],
  ['vision', value => VISIONS.includes(value)],
  ['backend', isText],
  ['models', areTexts],
  ['produces', areTexts],
  ['accepts', areTexts],
  ['notes', unless(areTexts)],
  ['version', unless(isText)],
  ['fingerprint', unless(isText)],
  ['epoch', unless(isNumber)],
  ['maxPrefillTokens', unless(isNumber)],
  ['standalone', unless(value => typeof value === 'boolean')]
]

/**
 * What a node says of itself has come over the network, and through an adapter that may be anybody's. Wrong in one
 * place it would fail in another, where requests of other nodes would meet it.
 *
 * @throws TypeError that names the field
 */
export function checkedInfo (info: NodeInfo): NodeInfo {
  for (const [field, check] of CHECKS) {
    if (!check(info[field])) throw new TypeError(`the node's answers make no sense: ${field} is ${JSON.stringify(info[field]) ?? 'missing'}`)
  }
  return info
}
