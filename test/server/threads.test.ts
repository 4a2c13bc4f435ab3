import type { Worker } from 'node:worker_threads'
import t from 'tap'
import { request } from 'undici'
import { startEngineFor } from '../helper/engine.ts'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'

for (const [role, threads] of [['encoder', ['transfer', 'preprocess', 'vision']], ['hybrid', ['transfer', 'llm', 'preprocess', 'vision']]] as const) {
  t.test(`${role}: when a thread ends /health says so, and it is started anew`, async t => {
    const workers: Worker[] = []
    const onWorker = (worker: Worker): void => { workers.push(worker) }
    process.on('worker', onWorker)
    t.teardown(() => { process.off('worker', onWorker) })
    const { url } = await startEngineFor(t, { role, vision: true })
    t.equal(workers.length, threads.length)
    const health = async (): Promise<[number, string]> => {
      const { statusCode, body } = await request(url + '/health')
      return [statusCode, (await body.json() as { message: string }).message]
    }
    let seed = 0
    const chat = async (): Promise<number> => {
      const content = [{ type: 'image_url', image_url: { url: await drawScene(++seed) } }, { type: 'text', text: 'What is this?' }]
      const { statusCode, body } = await request(url + '/v1/chat/completions', {
        method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ messages: [{ role: 'user', content }], max_tokens: 3 })
      })
      await body.dump()
      return statusCode
    }
    t.equal(await chat(), 200)
    for (const [i, thread] of threads.entries()) {
      const worker = workers[i] as Worker
      // No message of ours: the thread fails at it.
      worker.postMessage(null)
      // Not events.once: a crash emits 'error' before 'exit', and that would reject.
      await new Promise<void>(resolve => { worker.once('exit', () => { resolve() }) })
      t.match(await health(), [503, /is being started anew/], `${thread}: not healthy`)
      t.equal(await chat(), 503, `${thread}: requests are refused meanwhile`)
      await until(async () => (await health())[0] === 200, `${thread}: it works again`)
      t.equal(await chat(), 200, `${thread}: pictures are served`)
    }
  })
}
