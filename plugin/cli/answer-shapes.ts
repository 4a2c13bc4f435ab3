/** What the commands take from a gateway: another server, or another version, may stand at its URL. */
import { Type, type TSchema } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'

const text = Type.String()
const number = Type.Number()
const texts = Type.Array(text)
const maybe = <T extends TSchema>(schema: T) => Type.Optional(Type.Union([schema, Type.Null()]))

const link = Type.Object({ state: text, reason: Type.Optional(text), transport: Type.Optional(text) })
const node = Type.Object({
  role: number,
  models: texts,
  unfinished: number,
  latency: Type.Array(number),
  health: text,
  adapter: text,
  vision_tokens: number,
  notes: texts,
  breakers: Type.Record(text, text),
  links: Type.Record(text, link),
  backend: maybe(text),
  epoch: maybe(number),
  vision: maybe(text),
  fingerprint: maybe(text),
  produces: maybe(texts),
  accepts: maybe(texts)
})
const failure = Type.Object({ attempt: number, stage: text, node: Type.Optional(text), code: text, message: text })
const trace = Type.Object({
  traceId: text,
  name: text,
  status: text,
  start: text,
  durationMs: number,
  partial: Type.Boolean(),
  retries: number,
  failures: Type.Array(failure),
  statusCode: Type.Optional(number),
  error: Type.Optional(Type.Object({ code: text, message: text })),
  ...Object.fromEntries(['model', 'plan', 'reason'].map(name => [name, Type.Optional(text)])),
  ...Object.fromEntries(['inputTokens', 'outputTokens', 'firstTokenMs', 'perTokenMs'].map(name => [name, Type.Optional(number)]))
})
const span = Type.Object({
  spanId: text,
  parentSpanId: Type.Union([text, Type.Null()]),
  name: text,
  offsetMs: number,
  durationMs: number,
  attributes: Type.Record(text, Type.Unknown()),
  status: Type.Object({ code: text, message: Type.Optional(text) }),
  instance: Type.Union([text, Type.Null()])
})

/** The answer of `GET /nodes/status`. */
export const NODES = Type.Record(text, node)
/** The answers of `GET /epd/traces` and `GET /epd/traces/:id`. */
export const TRACES = Type.Object({ traces: Type.Array(Type.Intersect([trace, Type.Object({ spans: number })])) })
export const TRACE = Type.Intersect([trace, Type.Object({ spans: Type.Array(span, { minItems: 1 }) })])

/** Where the value is of another shape, and how; undefined when it fits. */
export function misfit (shape: TSchema, value: unknown): string | undefined {
  const first = Value.Errors(shape, value).First()
  return first === undefined ? undefined : `${first.path || '/'}: ${first.message}`
}
