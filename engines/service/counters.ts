/** Semconv GenAI server histograms an engine feeds, in seconds (the api_server itself measures whole requests). */
export type LatencyName = 'time_to_first_token' | 'time_per_output_token'

/**
 * What an engine has done since its start. Plain numbers, added to where things happen and read when /metrics is
 * asked for; the api_server listens for latencies, which a sum can't tell.
 */
export class EngineCounters {
  /** Items that went through the vision encoder (not those found in the cache). */
  encodedItems = 0
  /** Items answered from the feature cache, or joined to the same item in flight. */
  encoderCacheHits = 0
  /** Bytes of blocks pulled into this engine. */
  migratedBytes = 0
  /** ACKs that ended a lease of this engine (as producer). */
  acks = 0
  #listener: ((name: LatencyName, seconds: number) => void) | undefined

  /** Arrival to first token: queueing, migration and prefill. */
  observe (name: LatencyName, seconds: number): void {
    this.#listener?.(name, seconds)
  }

  /** One listener: the api_server's histograms. */
  onObserve (listener: (name: LatencyName, seconds: number) => void): void {
    this.#listener = listener
  }
}
