import { SpanKind } from '@opentelemetry/api'

export type AttributeValue = string | number | boolean | ReadonlyArray<string | number | boolean | null | undefined>
export type SpanKindName = 'internal' | 'server' | 'client' | 'producer' | 'consumer'

/** Whose a span is: service.name and service.instance.id, for an engine its engine id. */
export interface SpanOrigin {
  readonly service: string
  readonly instance?: string | undefined
}

/** A finished span, of the gateway or of an engine. */
export interface StoredSpan extends SpanOrigin {
  /** 32 and 16 hex digits. */
  readonly traceId: string
  readonly spanId: string
  readonly parentSpanId: string | undefined
  readonly name: string
  readonly kind: SpanKindName
  /** Unix time: whole seconds and the nanoseconds beyond them. */
  readonly startTime: readonly [seconds: number, nanoseconds: number]
  readonly endTime: readonly [seconds: number, nanoseconds: number]
  readonly attributes: Readonly<Record<string, AttributeValue | undefined>>
  readonly status: 'unset' | 'ok' | 'error'
  /** Description of the error. */
  readonly message?: string | undefined
}

export const SPAN_KINDS: Readonly<Record<SpanKind, SpanKindName>> = {
  [SpanKind.INTERNAL]: 'internal',
  [SpanKind.SERVER]: 'server',
  [SpanKind.CLIENT]: 'client',
  [SpanKind.PRODUCER]: 'producer',
  [SpanKind.CONSUMER]: 'consumer'
}
