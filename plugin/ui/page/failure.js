import { count, el, ms, named, nameOf } from './dom.js'

const STAGES = new Map([['epd.encode.call', 'encode'], ['epd.prefill', 'prefill'], ['epd.decode', 'decode']])
const ENDS = { ok: 'answered', failed: 'failed', aborted: 'ended' }
/** Calls shown of one request: with eight attempts over many encoders there may be hundreds. */
const MAX_CALLS = 40

/** Of a request that failed, or went well only in the end: the error as the client got it, and every call in order, with what came after it. */
export function failureOf (trace) {
  const { status, statusCode, error, failures, partial } = trace
  if (error === undefined && failures.length === 0) return []
  const attempts = attemptsOf(trace.spans)
  return [el('section', { class: 'failure', data: { status: error === undefined ? 'ok' : status }, aria: { label: 'What went wrong' } },
    error === undefined ? el('p', {}, `${count(failures.length, 'call')} failed on the way.`) : el('p', {}, el('code', {}, error.code), statusCode === undefined ? '' : el('small', {}, ` status ${statusCode}`)),
    error === undefined ? '' : el('p', { title: error.message }, named(error.message)),
    el('ol', { class: 'attempts' }, ...attempts.slice(0, MAX_CALLS).map(item)),
    attempts.length > MAX_CALLS ? el('p', {}, `and ${attempts.length - MAX_CALLS} more`) : '',
    el('p', { class: 'outcome' }, outcome(trace, attempts, partial)))]
}

/** Plans that failed and calls to nodes, in the order in which they began, each with the number of its attempt. */
function attemptsOf (spans) {
  let attempt = 0
  const steps = []
  for (const span of spans) {
    const failed = span.status.code === 'error'
    if (span.name === 'epd.plan') attempt++
    if (span.name === 'epd.plan' && !failed) continue
    const stage = span.name === 'epd.plan' ? 'plan' : STAGES.get(span.name)
    if (stage === undefined) continue
    const end = failed ? 'failed' : span.attributes['epd.aborted'] === true ? 'aborted' : 'ok'
    const node = span.attributes['epd.node']
    const why = failed ? [span.attributes['error.type'], named(span.status.message)].filter(Boolean).join(': ') : ''
    steps.push({ attempt: Math.max(1, attempt), stage, node, end, why, took: span.durationMs })
  }
  return steps
}

function item ({ attempt, stage, node, end, why, took }, index, all) {
  return el('li', { data: { end } },
    el('b', {}, all[index - 1]?.attempt === attempt ? '' : `attempt ${attempt}`),
    el('span', { title: node === undefined ? '' : String(node) }, node === undefined ? stage : `${stage} on ${nameOf(node)}`),
    el('span', {}, `${ENDS[end]} after ${ms(took)}`),
    el('span', { class: 'cause' }, why))
}

/** What became of the request after the last failure. */
function outcome ({ error, status }, attempts, partial) {
  if (partial) return 'The request is still running.'
  const after = attempts.slice(attempts.findLastIndex(({ end }) => end === 'failed') + 1).filter(({ end }) => end === 'ok')
  if (error === undefined) return after.length === 0 ? 'The request went on.' : `Then ${after.map(({ stage, node }) => `${stage} on ${nameOf(node)}`).join(', ')} answered.`
  return status === 'refused' ? 'The client got this answer; nothing else was tried.' : attempts.length === 0 ? 'No node was called.' : 'Nothing else was tried.'
}
