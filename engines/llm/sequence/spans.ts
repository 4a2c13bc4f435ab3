import { trace, type Span } from '@opentelemetry/api'
import type { EngineCounters } from '../../service/engine-service.ts'
import { ATTR, ENGINE_TRACER_NAME, SPAN } from '../../../adapters/wire/semconv.ts'
import { failSpan, spanTime } from '../../../adapters/wire/spans.ts'
import type { Outcome, Sequence } from './sequence.ts'

interface Spans {
  prefill?: Span
  decode?: Span
}

/** Spans `engine.prepare` of a sequence without output, `engine.prefill` (where it is prefilled) and `engine.decode` of each sequence, and its latencies. Without an SDK spans cost nothing. */
export class SequenceSpans {
  readonly #spans = new Map<Sequence, Spans>()
  readonly #counters: EngineCounters

  constructor (counters: EngineCounters) {
    this.#counters = counters
  }

  #spansOf (sequence: Sequence): Spans {
    let spans = this.#spans.get(sequence)
    if (spans === undefined) this.#spans.set(sequence, spans = {})
    return spans
  }

  #start (name: string, sequence: Sequence): Span {
    return trace.getTracer(ENGINE_TRACER_NAME).startSpan(name, { startTime: spanTime(), attributes: { [ATTR.requestId]: sequence.requestId } }, sequence.context)
  }

  /** The sequence runs; the first time starts `engine.prefill`, with the wait before it as `epd.queue_ms`. A migrated one was prefilled elsewhere. */
  running (sequence: Sequence): void {
    const spans = this.#spansOf(sequence)
    if (spans.prefill !== undefined || sequence.migration !== undefined) return
    spans.prefill = this.#start(sequence.maxTokens > 0 ? SPAN.enginePrefill : SPAN.enginePrepare, sequence)
    if (!spans.prefill.isRecording()) return
    spans.prefill.setAttributes({
      ...sequence.ahead === 0 ? {} : { [ATTR.ahead]: sequence.ahead },
      [ATTR.inputTokens]: sequence.promptLength,
      [ATTR.cached]: sequence.cachedTokens ?? 0,
      [ATTR.tokens]: sequence.promptLength - (sequence.cachedTokens ?? 0) - sequence.ahead,
      [ATTR.queueMs]: (sequence.times.admitted ?? 0) - sequence.times.arrived
    })
  }

  /** A token was sampled. The first one ends the prefill span, because the client can read it. */
  sampled (sequence: Sequence): void {
    const now = performance.now()
    sequence.times.lastToken = now
    if (sequence.times.firstToken !== undefined) return
    sequence.times.firstToken = now
    this.#counters.observe('time_to_first_token', (now - sequence.times.arrived) / 1000, sequence.context)
    // A sequence of one token has no decode span; its prefill span ends with it.
    if (sequence.maxTokens === 1 && sequence.migration === undefined) return
    const spans = this.#spansOf(sequence)
    spans.prefill?.end(spanTime())
    spans.decode = this.#start(SPAN.engineDecode, sequence)
  }

  ended (sequence: Sequence, outcome: Outcome): void {
    const { firstToken, lastToken = 0 } = sequence.times
    if (firstToken !== undefined && sequence.generated > 1) {
      this.#counters.observe('time_per_output_token', (lastToken - firstToken) / 1000 / (sequence.generated - 1), sequence.context)
    }
    const spans = this.#spans.get(sequence)
    this.#spans.delete(sequence)
    const last = spans?.decode ?? spans?.prefill
    if (last === undefined) return
    if (sequence.maxTokens === 0) return last.end(spanTime())
    // `stopped` may be an error too: the engine closed, and not the client.
    if ('error' in outcome) failSpan(last, outcome.error)
    else last.setAttribute(ATTR.finishReasons, [outcome.kind])
    last.setAttribute(ATTR.outputTokens, sequence.generated)
    last.end(spanTime())
  }
}
