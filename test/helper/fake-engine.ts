import { ROLE_TO_WIRE } from '../../adapters/wire/roles.ts'
import { EngineCounters, type ChatAnswer, type ChatCall, type EngineRole, type EngineService, type GaugeName } from '../../engines/service/engine-service.ts'

/** An engine without a model, scripted by tests: what the api_server does around an engine can be tested alone. */
export class FakeEngine implements EngineService {
  readonly role: EngineRole
  readonly backend = 'pytorch'
  readonly model = { name: 'fake-vlm', fingerprint: 'f'.repeat(64) }
  readonly epoch = 4711
  readonly counters = new EngineCounters()
  readonly values: Partial<Record<GaugeName, number>> = { epd_feature_blocks_capacity: 8, epd_feature_blocks_free: 5, epd_feature_blocks_cached: 3 }
  readonly statuses: Record<string, number> = {}
  readonly linked: object[] = []
  readonly linkTraces: Array<string | undefined> = []
  readonly dropped: string[] = []
  readonly aborted: string[] = []
  readonly ended: Array<number | string> = []
  readonly calls: ChatCall[] = []
  cleared = 0
  closed = 0
  ready: Promise<void> = Promise.resolve()
  answer: (call: ChatCall) => Promise<ChatAnswer> = async () => ({ status: 200, json: { object: 'chat.completion', choices: [{ index: 0, message: { role: 'assistant', content: '' }, finish_reason: 'stop' }] } })
  connecting: (remote: object) => Promise<void> = async () => {}
  readonly url: string

  constructor (url: string, role: EngineRole = 'hybrid') {
    this.url = url
    this.role = role
  }

  readonly p2p = {
    endpoint: { v: 1, engine: 'http://itself:1', tcp: 'tcp://127.0.0.1:9999' },
    connect: async (remote: object, options: { traceparent?: string | undefined } = {}) => {
      await this.connecting(remote)
      this.linked.push(remote)
      this.linkTraces.push(options.traceparent)
    },
    drop: async (engineId: string) => { this.dropped.push(engineId) }
  }

  info (): ReturnType<EngineService['info']> {
    return {
      tp_size: 1,
      ep_size: 1,
      dp_size: 1,
      pp_size: null,
      dp_rank: 0,
      block_size: 32,
      num_cpu_blocks: 0,
      num_gpu_blocks: 8,
      engine: 'fastify-epd',
      version: '0.0.0',
      backend: 'pytorch',
      role: ROLE_TO_WIRE[this.role],
      epoch: this.epoch,
      model: this.model.name,
      fingerprint: this.model.fingerprint,
      vision: 'full',
      produces: [],
      accepts: []
    }
  }

  gauges (): Partial<Record<GaugeName, number>> { return this.values }
  sequences (): Record<string, number> { return this.statuses }
  chat (call: ChatCall): Promise<ChatAnswer> {
    this.calls.push(call)
    return this.answer(call)
  }

  abort (requestId: string): boolean { return this.aborted.push(requestId) > 0 }
  endSession (id: number | string): void { this.ended.push(id) }
  clearCache (): void { this.cleared++ }
  async close (): Promise<void> { this.closed++ }
}
