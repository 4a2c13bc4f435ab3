/** What a node may answer in place of an answer. None of it may reach a client as a 200 that is no answer. */

export interface SpoiltAnswer {
  readonly type: string
  readonly body: string | Buffer
}

export type Spoil = (type: string, answer: Buffer) => SpoiltAnswer

const PAGE = '<!doctype html><html><body><h1>It works!</h1></body></html>'
const half = (answer: Buffer): Buffer => answer.subarray(0, answer.length >> 1)

/** Spoils whatever the node answers. A stream that is cut in half has begun, so that its client gets an error event. */
export const SPOIL: Readonly<Record<string, Spoil>> = {
  empty: type => ({ type, body: '' }),
  null: type => ({ type, body: type.startsWith('text/event-stream') ? 'data: null\n\n' : 'null' }),
  page: () => ({ type: 'text/html', body: PAGE }),
  'page as an answer': type => ({ type, body: PAGE }),
  'other type': (_type, answer) => ({ type: 'application/octet-stream', body: answer }),
  cut: (type, answer) => ({ type, body: half(answer) }),
  'no members': type => ({ type, body: type.startsWith('text/event-stream') ? 'data: {}\n\ndata: [DONE]\n\n' : '{}' })
}

const results = (change: (result: Record<string, unknown>) => unknown): Spoil => (type, answer) => {
  let body: { encoder_result?: Array<Record<string, unknown>> }
  try { body = JSON.parse(answer.toString()) } catch { return { type, body: answer } }
  return { type, body: JSON.stringify({ ...body, encoder_result: body.encoder_result === undefined ? null : change(body.encoder_result[0] ?? {}) }) }
}
const without = (name: string): Spoil => results(({ [name]: _gone, ...rest }) => [rest])

/** What an encoder spoils besides: its result, inside a good answer. */
export const SPOIL_RESULT: Readonly<Record<string, Spoil>> = {
  'null result': results(() => null),
  'no result': results(() => []),
  'null in place of a result': results(() => [null]),
  'empty result': results(() => [{}]),
  'result without lease': without('lease'),
  'result without blocks': without('remote_block_ids'),
  'result of a number': results(() => 7)
}
