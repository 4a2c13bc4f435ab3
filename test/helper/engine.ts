import type { Test } from 'tap'
import { shippedModel, startEngine, type ApiServer, type StartEngineOptions } from '../../engines/server/index.ts'

export type { ApiServer } from '../../engines/server/index.ts'

/**
 * A real engine in this process, on the shipped model and a free port unless the options say otherwise. Encoders and
 * prefill nodes open the vision encoder. Closed at the test's teardown.
 */
export async function startEngineFor (t: Test, { role, ...options }: Partial<StartEngineOptions> & Pick<StartEngineOptions, 'role'>): Promise<ApiServer> {
  const engine = await startEngine({
    role,
    backend: 'pytorch',
    modelDir: shippedModel(),
    host: '127.0.0.1',
    port: 0,
    device: 'cpu',
    threads: 1,
    vision: role === 'encoder' || role === 'prefill',
    media: { allowPrivate: false, allowedDomains: [] },
    ...options
  })
  t.teardown(() => engine.close())
  return engine
}
