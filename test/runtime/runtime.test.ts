import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import t, { type Test } from 'tap'
import { ProgramHost, fromFloat16, parseDevice, threadsPerEngine, toFloat16, type Device } from '../../engines/runtime/index.ts'
import { Thread } from '../../engines/runtime/thread.ts'
import { loadOptional, missingPackage, requireOptional } from '../../engines/service/optional.ts'
import { GraphWriter, type ElementType } from '../helper/onnx.ts'
import { until } from '../helper/until.ts'
import type { TensorMethods } from './fixtures/tensor-program.ts'

const program = new URL('./fixtures/tensor-program.js', import.meta.url)

function addGraph (dir: string, type: ElementType = 'float32'): string {
  const graph = new GraphWriter()
  const x = graph.input({ name: 'x', type, shape: ['n'] })
  const y = graph.input({ name: 'y', type, shape: ['n'] })
  graph.output({ name: 'sum', type, shape: ['n'] }, graph.node('Add', [x, y]))
  graph.output({ name: 'product', type, shape: ['n'] }, graph.node('Mul', [x, y]))
  const path = join(dir, 'add.onnx')
  graph.save(path)
  return path
}

async function open (t: Test, options: { path?: string, device?: Device, pool?: SharedArrayBuffer, concurrency?: number, threads?: number } = {}): Promise<ProgramHost<TensorMethods>> {
  const { path, device = 'cpu', pool, concurrency, threads = 1 } = options
  const host = await ProgramHost.open<TensorMethods>({
    program, device, threads, data: path === undefined ? {} : { path }, ...(pool && { pools: { feature: pool } }), ...(concurrency && { concurrency })
  })
  t.teardown(() => host.close())
  return host
}

t.test('a program runs a graph in a worker and reports how long it took', async t => {
  const host = await open(t, { path: addGraph(t.testdir()) })
  const { value, busyUs, ortUs } = await host.call('run', { feeds: { x: [1, 2], y: [3, 4] } })
  t.same(value, { sum: [4, 6], product: [3, 8] })
  t.ok(ortUs > 0 && busyUs >= ortUs)
  t.same((await host.call('run', { feeds: { x: [1], y: [3] }, fetches: ['sum'] })).value, { sum: [4] }, 'fetches only what is named')
  t.same((await host.call('signature', null)).value, { inputs: ['x:float32:n', 'y:float32:n'], outputs: ['sum:float32:n', 'product:float32:n'] })
  t.equal(host.totals.calls, 3)
})

t.test('a program gathers from and scatters into a shared pool', async t => {
  const pool = new SharedArrayBuffer(64)
  new Float32Array(pool).set([1, 2, 3])
  const host = await open(t, { path: addGraph(t.testdir()), pool })
  t.same((await host.call('gather', { length: 3 })).value, [2, 4, 6])
  t.same([...new Float32Array(pool)].slice(0, 6), [1, 2, 3, 2, 4, 6])
})

t.test('results can be moved to the caller', async t => {
  const host = await open(t)
  const { value } = await host.call('move', { length: 1000 })
  t.equal(value.length, 1000)
  t.equal(value[999], 7)
})

t.test('errors of a method come with name and message, and the host goes on', async t => {
  const host = await open(t, { path: addGraph(t.testdir()) })
  await t.rejects(host.call('fail', { message: 'no such luck' }), { name: 'TypeError', message: 'no such luck' })
  await t.rejects(host.call('run', { feeds: {} }), /missing inputs: x, y/, 'all missing inputs are named at once')
  await t.rejects(host.call('run', { feeds: { x: [1, 2, 3], y: [1, 2] } }))
  await t.rejects(host.call('nothing' as 'order', null), /no method "nothing"/)
  await t.rejects(host.call('fail', { message: (() => {}) as unknown as string }), /could not be cloned/)
  t.same((await host.call('run', { feeds: { x: [1], y: [1] }, fetches: ['sum'] })).value, { sum: [2] })
})

t.test('calls run one at a time in order, and a signal drops one that still waits', async t => {
  const host = await open(t)
  const stop = new AbortController()
  const first = host.call('spin', { ms: 30, tag: 'first' })
  const dropped = host.call('spin', { ms: 1, tag: 'dropped' }, { signal: stop.signal })
  const third = host.call('spin', { ms: 1, tag: 'third' }, { signal: new AbortController().signal })
  t.equal(host.pending, 3)
  stop.abort(new Error('gone'))
  await t.rejects(dropped, { message: 'gone' })
  await t.rejects(host.call('spin', { ms: 1, tag: 'never' }, { signal: stop.signal }), { message: 'gone' })
  await Promise.all([first, third])
  t.same((await host.call('order', null)).value, ['first', 'third'])
})

t.test('close lets the running call end and rejects the others', async t => {
  const host = await open(t, { path: addGraph(t.testdir()) })
  const running = host.call('spin', { ms: 30, tag: 'a' })
  const waiting = host.call('spin', { ms: 1, tag: 'b' })
  await Promise.all([t.rejects(waiting, /is closed/), host.close(), t.resolves(running)])
  await t.rejects(host.call('order', null), /is closed/)
  await host.close()
})

t.test('a crash of the worker rejects what runs; what waits, and what comes later, goes to a new worker', async t => {
  const host = await open(t)
  const running = host.call('crash', null)
  const waiting = host.call('spin', { ms: 1, tag: 'waited' })
  await t.rejects(running, /crashed: out of luck/)
  t.match(host.problem, /is being started anew/)
  t.equal((await waiting).value, 'waited')
  t.equal(host.problem, undefined)
  t.same((await host.call('order', null)).value, ['waited'])
})

t.test('a worker that can\'t be started anew is tried again, and calls fail meanwhile', async t => {
  const dir = t.testdir()
  const path = addGraph(dir)
  const host = await open(t, { path })
  const graph = readFileSync(path)
  rmSync(path)
  await t.rejects(host.call('crash', null), /out of luck/)
  await t.rejects(host.call('order', null), { code: 'initialising', message: /could not be started anew/ })
  t.match(host.problem, /is being started anew/)
  writeFileSync(path, graph)
  await until(() => host.problem === undefined, 'it works again')
  t.same((await host.call('order', null)).value, [])
})

t.test('a worker may say something before it says that it works', async t => {
  const heard: string[] = []
  const open = async (words: readonly string[]): Promise<Thread<string>> => await Thread.open<string>({
    name: 'talker',
    make: () => new Worker(`const { parentPort } = require('worker_threads'); for (const word of ${JSON.stringify(words)}) parentPort.postMessage(word); parentPort.on('message', () => parentPort.close())`, { eval: true }),
    started: word => word === 'works' ? 'works' : word === 'broken' ? new Error(word) : undefined,
    onMessage: word => { heard.push(word) },
    onLost: () => {},
    onBack: () => {}
  })
  const thread = await open(['a log line', 'works', 'broken'])
  t.equal(thread.problem, undefined)
  await thread.close('end', 5000)
  t.same(heard, ['a log line', 'works', 'broken'])
})

t.test('a graph that is missing or broken is refused by name when the program starts', async t => {
  const dir = t.testdir({ 'broken.onnx': 'rubbish' })
  await t.rejects(ProgramHost.open({ program, device: 'cpu', threads: 1, data: { path: join(dir, 'none.onnx') } }), /none\.onnx can't be opened/)
  await t.rejects(ProgramHost.open({ program, device: 'cpu', threads: 1, data: { path: join(dir, 'broken.onnx') } }), /broken\.onnx can't be opened/)
  await t.rejects(ProgramHost.open({ program: new URL('./nowhere.js', import.meta.url), device: 'cpu', threads: 1, data: {} }), /nowhere/)
})

const hasCuda = existsSync('/dev/nvidia0')
t.test('without a CUDA provider, device cuda fails with what to install and never falls back', { skip: hasCuda && 'this machine has CUDA' }, async t => {
  const path = addGraph(t.testdir())
  await t.rejects(ProgramHost.open({ program, device: 'cuda', threads: 1, data: { path } }), /device cuda can't be used.*libonnxruntime_providers_cuda\.so/)
  await t.rejects(ProgramHost.open({ program, device: 'cuda:1', threads: 1, data: { path } }), /device cuda:1 can't be used/)
})

t.test('float16 graphs take and give bits, on every version of Node.js', async t => {
  const graph = new GraphWriter()
  const x = graph.input({ name: 'x', type: 'float16', shape: ['n'] })
  graph.output({ name: 'y', type: 'float16', shape: ['n'] }, graph.node('Add', [x, x]))
  const path = join(t.testdir(), 'half.onnx')
  graph.save(path)
  const host = await open(t, { path })
  const { value } = await host.call('runHalf', { bits: [1.5, -2, 0.1].map(toFloat16) })
  t.same(value.map(fromFloat16), [3, -4, 2 * fromFloat16(toFloat16(0.1))])
})

t.test('half precision rounds to nearest, ties to even', async t => {
  for (let bits = 0; bits < 0x7c00; bits++) if (toFloat16(fromFloat16(bits)) !== bits) t.fail(`bits ${bits}`)
  t.equal(toFloat16(1 + 2 ** -11), 0x3c00, 'a tie goes to the even neighbour below')
  t.equal(toFloat16(1 + 3 * 2 ** -11), 0x3c02, 'and above')
  t.equal(toFloat16(65520), 0x7c00)
  t.equal(toFloat16(65519), 0x7bff)
  t.equal(toFloat16(2 ** -25), 0)
  t.equal(toFloat16(3 * 2 ** -25), 2)
  t.equal(toFloat16(-Infinity), 0xfc00)
  t.ok(Number.isNaN(fromFloat16(toFloat16(NaN))))
  t.equal(fromFloat16(0xfc00), -Infinity)
})

t.test('several engines of one machine share its cores', async t => {
  t.equal(threadsPerEngine(3), 3)
  t.ok(threadsPerEngine(undefined, 1) >= 1)
  t.equal(threadsPerEngine(undefined, 10_000), 1)
  t.equal(threadsPerEngine(0, NaN), threadsPerEngine(undefined, 1))
})

t.test('a session takes the threads it is given and no more', { skip: existsSync('/proc/self/task') ? false : 'threads are counted in /proc' }, async t => {
  const path = addGraph(t.testdir())
  const started = async (threads: number): Promise<number> => {
    const before = readdirSync('/proc/self/task').length
    await open(t, { path, threads })
    return readdirSync('/proc/self/task').length - before
  }
  await started(1)
  const alone = await started(1)
  // The thread that calls `run` is one of them.
  t.same([await started(2), await started(4)], [alone + 1, alone + 3])
})

t.test('devices are cpu, cuda and cuda:N', async t => {
  t.same(['cpu', 'cuda', 'cuda:12'].map(parseDevice), ['cpu', 'cuda', 'cuda:12'])
  for (const text of ['gpu', 'cuda:', 'cuda:x', 'CPU']) t.throws(() => parseDevice(text), /use cpu, cuda or cuda:N/)
})

t.test('a missing optional package says how to install it', async t => {
  t.match(missingPackage('zeromq', new Error('Cannot find package\nmore')).message, /needs? the package zeromq \(the P2P link between engines\).*npm install --ignore-scripts onnxruntime-node zeromq /)
  t.type(requireOptional('sharp'), 'function')
  await t.rejects(loadOptional('no-such-thing' as '@huggingface/jinja'), /the package no-such-thing .*npm install --ignore-scripts onnxruntime-node /)
  t.throws(() => requireOptional('no-such-thing' as 'sharp'), /the package no-such-thing .*npm install --ignore-scripts onnxruntime-node /)
})
