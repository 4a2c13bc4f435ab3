import type { Test } from 'tap'
import type { EngineInfo, EngineRole } from '../../engines/service/engine-service.ts'
import { startApiServer } from '../../engines/server/index.ts'
import { FakeEngine } from './fake-engine.ts'

const FEATURES = 'features:epd-zmq/1'
const KV = 'kv:epd-zmq/1'
const OF_ROLE: Readonly<Record<EngineRole, Pick<EngineInfo, 'produces' | 'accepts' | 'vision'>>> = {
  encoder: { produces: [FEATURES], accepts: [], vision: 'full' },
  hybrid: { produces: [KV], accepts: [FEATURES], vision: 'features' },
  prefill: { produces: [KV], accepts: [FEATURES], vision: 'features' },
  decode: { produces: [], accepts: [KV], vision: 'none' }
}

/** A fake engine that links, and reports what a real one of its role does and what a test adds. */
export class ScriptedEngine extends FakeEngine {
  override readonly p2p = {
    endpoint: { v: 1, engine: this.url, epoch: 4711, host_id: 'h', tcp: 'tcp://127.0.0.1:9999', ipc: null, curve: null, fingerprint: 'f'.repeat(64), pools: {} },
    connect: async (remote: object) => {
      await this.connecting(remote)
      this.linked.push(remote)
    },
    drop: async (id: string) => { this.dropped.push(id) }
  }

  more: Partial<EngineInfo> = {}
  override info (): EngineInfo {
    return { ...super.info(), ...OF_ROLE[this.role], ...this.more }
  }
}

/** Our api_server around a scripted engine. */
export async function startScripted (t: Pick<Test, 'teardown'>, role: EngineRole): Promise<{ engine: ScriptedEngine, url: string }> {
  let engine: ScriptedEngine | undefined
  const server = await startApiServer({ version: '0.0.0', createEngine: async url => (engine = new ScriptedEngine(url, role)) })
  t.teardown(async () => { await server.close(0) })
  return { engine: engine!, url: server.url }
}
