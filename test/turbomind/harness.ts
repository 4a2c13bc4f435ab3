/** TurboMind-like engines without HTTP; everything else is the PyTorch-like engine's harness. */
import type { Test } from 'tap'
import type { EngineOptions } from '../../engines/service/engine-options.ts'
import type { LlmService } from '../../engines/llm/index.ts'
import { createTurbomindEngine, type TurbomindTuning } from '../../engines/turbomind/index.ts'
import { base } from '../llm/harness.ts'

let engines = 0

export async function startTurbomind (t: Test, options: Partial<EngineOptions> = {}, tuning: TurbomindTuning = {}): Promise<LlmService> {
  const engine = await createTurbomindEngine({ ...base, backend: 'turbomind', engineId: `http://turbomind-${++engines}`, role: 'hybrid', ...options }, tuning)
  t.teardown(() => engine.close())
  await engine.ready
  return engine
}
