/** An LLM engine in a process of its own, so that a test can kill it with -9. */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { createLlmEngine, type LlmService } from '../../engines/llm/index.ts'
import { EngineError } from '../../engines/service/errors.ts'
import type { P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'

type Command =
  | { op: 'open', endpoint?: P2PEndpointInfo, role?: 'hybrid' | 'prefill' | 'decode' }
  | { op: 'ask', body: object }
  | { op: 'gauges' }
  | { op: 'close' }

const log = { debug () {}, info () {}, warn () {}, error () {} }
let engine: LlmService | undefined

async function run (command: Command): Promise<object> {
  if (command.op === 'open') {
    engine = await createLlmEngine({
      engineId: 'http://llm-child',
      role: command.role ?? 'hybrid',
      backend: 'pytorch',
      modelDir: tinyModelDir,
      host: '127.0.0.1',
      device: 'cpu',
      threads: 1,
      vision: false,
      media: { allowPrivate: false, allowedDomains: [] },
      log
    })
    await engine.ready
    if (command.endpoint !== undefined) await engine.p2p.connect(command.endpoint)
    return { endpoint: engine.p2p.endpoint }
  }
  if (engine === undefined) throw new Error('not open')
  if (command.op === 'gauges') return { gauges: engine.gauges(), sequences: engine.sequences() }
  if (command.op === 'ask') {
    const answer = await engine.chat({ body: command.body, signal: new AbortController().signal, requestId: 'r', context: ROOT_CONTEXT })
    return { status: answer.status, json: 'json' in answer ? answer.json : undefined }
  }
  await engine.close()
  process.disconnect()
  return {}
}

process.on('message', (command: Command) => {
  run(command).catch((err: unknown) => ({ error: String(err), status: EngineError.is(err) ? err.status : 500 })).then(answer => {
    if (process.connected) process.send?.(answer)
  })
})
process.on('disconnect', () => { if (engine === undefined) process.exit() })
