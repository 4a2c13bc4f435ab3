/**
 * Who is to blame: for every way in which a call to a node can end badly, whether it counts against the node's breaker,
 * whether the request goes on elsewhere, and what its client sees. docs/errors.md prints this table.
 */
import { AdapterError, type Stage } from '../../adapters/adapter.ts'
import { epdError, type EpdErrorCode } from '../errors.ts'
import type { Verdict } from '../registry/index.ts'

/** What becomes of a request under which a call went wrong. */
export interface Treatment {
  /** Does it count against the breaker of node and stage? `unclear`: it shows neither a sick node nor a well one. */
  readonly counts: 'yes' | 'no' | 'unclear'
  /** Is the request sent again? `elsewhere`: to another node, if there is one. `anywhere`: also to the same node, when it is the only one. */
  readonly again: 'no' | 'elsewhere' | 'anywhere'
  /** What the client gets when it is not sent again, or in vain: the node's own answer, or an error of the gateway. */
  readonly client: 'as it came' | EpdErrorCode
}

interface Row extends Treatment {
  /** For people. */
  readonly what: string
  /** Where an encode call is treated in another way. */
  readonly encode?: Partial<Treatment>
}

/** An encoder's own error means nothing to a client who asked a language model. */
const OTHER_ENCODER = { again: 'elsewhere', client: 'EPD_ERR_ENCODE_FAILED' } as const

export const BLAME = {
  refused: { what: 'any other 4xx', counts: 'no', again: 'no', client: 'as it came' },
  'no such route': { what: '404, 405, 501: the node lacks the route', counts: 'no', again: 'no', client: 'as it came', encode: OTHER_ENCODER },
  'rate limited': { what: '429', counts: 'no', again: 'elsewhere', client: 'as it came', encode: { client: 'EPD_ERR_UPSTREAM_BUSY' } },
  full: { what: '503', counts: 'no', again: 'elsewhere', client: 'as it came', encode: { client: 'EPD_ERR_UPSTREAM_BUSY' } },
  failed: { what: 'any other 5xx', counts: 'no', again: 'elsewhere', client: 'as it came', encode: OTHER_ENCODER },
  'wrong key': { what: "401: the key is the gateway's own", counts: 'no', again: 'elsewhere', client: 'EPD_ERR_UPSTREAM_FAILED', encode: OTHER_ENCODER },
  'gave up': { what: '408, 499, or a redirection', counts: 'no', again: 'anywhere', client: 'EPD_ERR_UPSTREAM_FAILED', encode: OTHER_ENCODER },
  unreachable: { what: 'no connection', counts: 'yes', again: 'anywhere', client: 'EPD_ERR_UPSTREAM_FAILED', encode: OTHER_ENCODER },
  cut: { what: 'the connection broke before the head, in it or before the first event, and the node is alive, or has died of something else', counts: 'yes', again: 'anywhere', client: 'EPD_ERR_UPSTREAM_FAILED', encode: OTHER_ENCODER },
  died: { what: 'the same, and the node is dead', counts: 'yes', again: 'no', client: 'EPD_ERR_NODE_DIED' },
  late: { what: 'the time of the stage was up', counts: 'yes', again: 'anywhere', client: 'EPD_ERR_UPSTREAM_TIMEOUT', encode: OTHER_ENCODER },
  nonsense: { what: 'a good status without an answer: an empty body, a page, `null`, cut JSON, a broken content-encoding, another content-type, a stream without events, or whose first event is no part of an answer, or whose choices are all empty; a status above 599', counts: 'yes', again: 'anywhere', client: 'EPD_ERR_UPSTREAM_FAILED', encode: OTHER_ENCODER },
  broken: { what: 'a break, or silence for `timeouts.idle`, after the first event and before `[DONE]`; a stream of choices that ends with neither `[DONE]` nor a `finish_reason`', counts: 'yes', again: 'no', client: 'EPD_ERR_UPSTREAM_BROKEN' },
  unread: { what: 'the same, and the node had to wait for a client that read slowly', counts: 'unclear', again: 'no', client: 'EPD_ERR_UPSTREAM_BROKEN' },
  'features gone': { what: 'what an encoder had made is lost', counts: 'no', again: 'anywhere', client: 'EPD_ERR_FEATURES_GONE' },
  'kv gone': { what: 'what a prefill node had made is lost', counts: 'no', again: 'anywhere', client: 'EPD_ERR_KV_GONE' },
  unfit: { what: 'the two nodes can not work together', counts: 'unclear', again: 'anywhere', client: 'EPD_ERR_LINK_REFUSED' },
  stopped: { what: 'the client left, or the gateway ended the call', counts: 'unclear', again: 'no', client: 'EPD_ERR_INTERNAL' }
} as const satisfies Record<string, Row>

export type Outcome = keyof typeof BLAME

/** What a failed call was. */
export function outcomeOf (error: unknown): Outcome {
  if (!AdapterError.is(error)) return 'stopped'
  if (error.code === 'REFUSED') return 'unfit'
  if (error.code === 'FEATURES_GONE') return 'features gone'
  if (error.code === 'KV_GONE') return 'kv gone'
  if (error.how !== undefined) return error.how
  // An adapter that knows better has said so.
  if (error.code === 'REJECTED' && error.fault !== 'client') return 'failed'
  if (error.response !== undefined) return outcomeOfStatus(error.response.statusCode)
  return error.code === 'BUSY' ? 'full' : error.code === 'REJECTED' ? 'refused' : 'cut'
}

export function outcomeOfStatus (statusCode: number): Outcome {
  switch (statusCode) {
    case 404: case 405: case 501: return 'no such route'
    case 429: return 'rate limited'
    case 503: return 'full'
    case 401: return 'wrong key'
    case 408: case 499: return 'gave up'
    default: return statusCode >= 500 ? 'failed' : statusCode >= 400 ? 'refused' : 'gave up'
  }
}

/** The one reading of the table. */
export function treatmentOf (outcome: Outcome, stage: Stage): Treatment {
  const row: Row = BLAME[outcome]
  return stage === 'encode' ? { ...row, ...row.encode } : row
}

const VERDICTS: Readonly<Record<Treatment['counts'], Verdict>> = { yes: 'failed', no: 'alive', unclear: 'unclear' }

/** What a failed call says of its node. */
export function verdictOn (error: unknown, stage: Stage): Verdict {
  return VERDICTS[treatmentOf(outcomeOf(error), stage).counts]
}

/** Is the request sent again after this? */
export function againAfter (error: unknown, stage: Stage): Treatment['again'] {
  return treatmentOf(outcomeOf(error), stage).again
}

/** The error that the client sees: one of the gateway's, or an AdapterError whose response goes to the client as it came. */
export function clientsError (error: unknown, stage: Stage): unknown {
  if (!AdapterError.is(error)) return error
  const outcome = outcomeOf(error)
  const { client } = treatmentOf(outcome, stage)
  if (client !== 'as it came') return epdError(client, [], { cause: error, retryAfter: error.retryAfter })
  if (error.response !== undefined) return error
  return epdError(outcome === 'full' ? 'EPD_ERR_UPSTREAM_BUSY' : 'EPD_ERR_UPSTREAM_FAILED', [], { cause: error, retryAfter: error.retryAfter })
}

/** How much a failure says to a client: what a node has answered says more than that another one could not be reached. */
export function saysMore (one: unknown, other: unknown): boolean {
  return AdapterError.is(one) && one.response !== undefined && AdapterError.is(other) && other.response === undefined && outcomeOf(other) !== 'died'
}
