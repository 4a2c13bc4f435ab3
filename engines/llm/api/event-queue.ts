/** Events from the engine on their way to one reader. Bounded by what the request may generate. */
export class EventQueue<T> {
  #events: T[] = []
  #wake: (() => void) | undefined

  push (event: T): void {
    this.#events.push(event)
    this.#wake?.()
  }

  /** Everything that has happened since the last call; waits for at least one event. */
  async take (): Promise<T[]> {
    if (this.#events.length === 0) {
      await new Promise<void>(resolve => { this.#wake = resolve })
      this.#wake = undefined
    }
    const events = this.#events
    this.#events = []
    return events
  }
}
