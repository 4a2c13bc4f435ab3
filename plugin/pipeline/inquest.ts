/** What a failed call was, where its error alone does not say it. */
import { AdapterError } from '../../adapters/adapter.ts'
import { isEpdError } from '../errors.ts'
import type { Ticket } from '../registry/index.ts'
import { outcomeOf } from './blame.ts'

/**
 * A connection was cut: is the node alive? A request under which it has died may be why, and is not sent to a second one.
 * Other requests that were with it are.
 */
export async function inquest (failure: unknown, ticket: Ticket): Promise<unknown> {
  if (!AdapterError.is(failure)) return failure
  const outcome = outcomeOf(failure)
  if (outcome !== 'cut' && outcome !== 'died') return failure
  const killed = await ticket.killed(outcome === 'died')
  if (killed === (outcome === 'died')) return failure
  return new AdapterError('UNAVAILABLE', killed ? `${failure.message}, and is dead` : failure.message, { node: failure.node, cause: failure, how: killed ? 'died' : 'cut' })
}

/**
 * An adapter that fails in another way than it should has met something that its node must not answer, such as `null` for a
 * result; or has a fault of its own.
 *
 * @param called its name and its function
 */
export function adaptersError (error: unknown, node: string, called: string): unknown {
  if (AdapterError.is(error) || isEpdError(error)) return error
  return new AdapterError('UNAVAILABLE', `adapter function ${called} failed on an answer of ${node}: ${String(error)}`, { node, cause: error, how: 'nonsense' })
}
