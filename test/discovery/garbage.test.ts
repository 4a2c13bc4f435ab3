/** What an API server should not answer, and answers that never come: no node is lost, and the next good answer counts. */
import type { ServerResponse } from 'node:http'
import t, { type Test } from 'tap'
import type { Found } from '../../plugin/discovery/found.ts'
import { followPods } from '../../plugin/discovery/kubernetes.ts'
import { FakeKubernetes } from '../helper/fake-kubernetes.ts'
import { until } from '../helper/until.ts'

/** All pauses are short; nothing here waits for an answer that does come. */
const TIMES = { answer: 60_000, watch: 60_000, steady: 60_000, pause: 1, maxPause: 20 }
const LABELS = { app: 'vllm' }
const POD = { kind: 'Pod', metadata: { name: 'a', resourceVersion: '7' }, status: { podIP: '127.0.0.2', conditions: [{ type: 'Ready', status: 'True' }] } }

interface Following {
  readonly given: Found[][]
  readonly reasons: string[]
}

async function follow (t: Test, { kubeconfig }: FakeKubernetes, times: Partial<typeof TIMES> = {}): Promise<Following> {
  const following: Following = { given: [], reasons: [] }
  const ignore = (): void => {}
  const log = { debug: ignore, info: ignore, error: ignore, warn: ({ reason }: { reason?: string }) => { following.reasons.push(reason!) } }
  t.teardown(await followPods({ selector: 'app=vllm', port: 8000, roleLabel: 'role', kubeconfig }, log, found => { following.given.push([...found]) }, { ...TIMES, ...times }))
  return following
}

const hosts = ({ given }: Following): string => (given.at(-1) ?? []).map(({ host }) => host).sort().join(' ')

const ANY = ['', 'null', '5', '"pods"', '[]', '{}', '{', '<html>Bad gateway</html>', '\0\xff\xfe', '{"kind":"Status","code":500,"message":"etcd is away"}']
const LISTS = [
  ...ANY,
  { kind: 'PodList' },
  { kind: 'PodList', metadata: null, items: [] },
  { kind: 'PodList', metadata: {}, items: [] },
  { kind: 'PodList', metadata: { resourceVersion: 7 }, items: [] },
  { kind: 'NodeList', metadata: { resourceVersion: '7' }, items: [] },
  ...[5, {}, 'a'].map(items => ({ kind: 'PodList', metadata: { resourceVersion: '7' }, items })),
  ...[null, 5, {}, { metadata: {} }, { metadata: { name: 5 } }, { ...POD, status: { conditions: 5 } }].map(pod => ({ kind: 'PodList', metadata: { resourceVersion: '7' }, items: [POD, pod] }))
]
const EVENTS = [
  ...ANY.filter(text => text !== ''),
  ' ',
  ...[undefined, null, 5, [], {}, { metadata: null }, { metadata: {} }, { metadata: { name: 'a' } }, { metadata: { name: 5, resourceVersion: '7' } }].map(object => ({ type: 'ADDED', object })),
  { type: 'DELETED', object: {} },
  { type: 'BOOKMARK', object: { metadata: {} } },
  { type: 'MODIFIED', object: { ...POD, status: { conditions: 5 } } },
  ...[undefined, null, {}, { code: 500 }, { code: 'x', message: 'y' }].map(object => ({ type: 'ERROR', object }))
]
const textOf = (answer: string | object): string => typeof answer === 'string' ? answer : JSON.stringify(answer)

t.test('garbage in place of a list costs no node, and is named', async t => {
  const kubernetes = await FakeKubernetes.start(t)
  kubernetes.set('a', { ip: '127.0.0.2', labels: LABELS })
  const following = await follow(t, kubernetes)
  await until(() => hosts(following) === '127.0.0.2', 'the pod is there')
  const rest = LISTS.map(textOf)
  kubernetes.instead = (call, response) => {
    if (call === 'watch' || rest.length === 0) return false
    response.writeHead(200, { 'content-type': 'application/json' }).end(rest.shift())
    return true
  }
  kubernetes.forget()
  kubernetes.endWatches()
  kubernetes.set('b', { ip: '127.0.0.3', labels: LABELS })
  await until(() => hosts(following) === '127.0.0.2 127.0.0.3', 'the list after them counts')
  t.equal(following.given.length, 2, 'none of them did')
  t.equal(following.reasons.length, LISTS.length, following.reasons.join('\n'))
})

t.test('garbage in a watch costs no node, and is named', async t => {
  const kubernetes = await FakeKubernetes.start(t)
  kubernetes.set('a', { ip: '127.0.0.2', labels: LABELS })
  const rest = EVENTS.map(textOf)
  kubernetes.instead = (call, response) => {
    if (call === 'list' || rest.length === 0) return false
    // The watch goes on: the client ends it.
    response.writeHead(200).write(rest.shift() + '\n')
    return true
  }
  const following = await follow(t, kubernetes)
  await until(() => rest.length === 0 && kubernetes.watches.length > 0, 'a good watch follows')
  kubernetes.set('b', { ip: '127.0.0.3', labels: LABELS })
  await until(() => hosts(following) === '127.0.0.2 127.0.0.3', 'and counts')
  t.equal(following.given.length, 2, 'none of them did')
  t.equal(following.reasons.length, EVENTS.length, following.reasons.join('\n'))
})

t.test('a pod whose address is none is no node', async t => {
  const kubernetes = await FakeKubernetes.start(t)
  for (const [i, ip] of ['', 'nowhere', '127.0.0.1/x', '127.0.0.2#', '300.1.1.1'].entries()) kubernetes.set(`odd-${i}`, { ip, labels: LABELS })
  kubernetes.set('a', { ip: '127.0.0.2', labels: { ...LABELS, role: '__proto__' } })
  const following = await follow(t, kubernetes)
  await until(() => following.given.length > 0, 'they are listed')
  t.same(following.given, [[{ host: '127.0.0.2', port: 8000 }]])
})

t.test('events are read whole, wherever the chunks are cut', async t => {
  const kubernetes = await FakeKubernetes.start(t)
  let watch: ServerResponse | undefined
  kubernetes.instead = (call, response) => {
    if (call === 'list') return false
    watch = response.writeHead(200)
    return true
  }
  const following = await follow(t, kubernetes)
  await until(() => watch, 'it watches')
  const bytes = Buffer.from(JSON.stringify({ type: 'ADDED', object: { ...POD, metadata: { ...POD.metadata, labels: { who: 'Zoë 🐟' } } } }) + '\n')
  for (const byte of bytes) await new Promise(resolve => { watch!.write(Buffer.of(byte), resolve) })
  await until(() => hosts(following) === '127.0.0.2', 'the pod is there')
  t.same(following.reasons, [])
})

t.test('a server that answers nothing, neither to a list nor to a watch, is asked again', async t => {
  const kubernetes = await FakeKubernetes.start(t)
  kubernetes.set('a', { ip: '127.0.0.2', labels: LABELS })
  const closed: Array<Promise<unknown>> = []
  const silent = { list: 2, watch: 2 }
  kubernetes.instead = (call, response) => {
    if (silent[call] === 0) return false
    silent[call]--
    closed.push(new Promise(resolve => { response.on('close', resolve) }))
    return true
  }
  const following = await follow(t, kubernetes, { answer: 500 })
  await until(() => hosts(following) === '127.0.0.2' && kubernetes.watches.length > 0, 'it is asked until it answers')
  await Promise.all(closed)
  t.ok(following.reasons.length >= 4)
  for (const reason of following.reasons) t.match(reason, /nothing came for 500 ms/)
})

t.test('a watch that says nothing, and that its server does not end, is ended', async t => {
  const kubernetes = await FakeKubernetes.start(t)
  kubernetes.set('a', { ip: '127.0.0.2', labels: LABELS })
  let silent = 2
  kubernetes.instead = (call, response) => {
    if (call === 'list' || silent === 0) return false
    silent--
    response.writeHead(200).flushHeaders()
    // The connection has broken unseen: this is never told.
    kubernetes.set('b', { ip: '127.0.0.3', labels: LABELS })
    return true
  }
  const following = await follow(t, kubernetes, { answer: 2_000, watch: 0 })
  await until(() => hosts(following) === '127.0.0.2 127.0.0.3', 'the list after it counts')
})

t.test('a server that ends each watch at once is asked with pauses', async t => {
  const hasty = async (): Promise<{ kubernetes: FakeKubernetes, ended: () => number }> => {
    const kubernetes = await FakeKubernetes.start(t)
    let ended = 0
    kubernetes.instead = (call, response) => {
      if (call === 'watch') response.writeHead(200).end(() => { ended++ })
      return call === 'watch'
    }
    return { kubernetes, ended: () => ended }
  }
  const one = await hasty()
  await follow(t, one.kubernetes, { pause: 3_600_000, maxPause: 3_600_000 })
  await until(() => one.ended() === 1, 'its watch has ended')
  const other = await hasty()
  await follow(t, other.kubernetes)
  await until(() => other.ended() > 20, 'after short pauses it is asked again and again')
  t.equal(other.kubernetes.lists.length, 1, 'a watch that ends is no failure')
  t.equal(one.ended(), 1)
})

t.test('a refusal is named by the server\'s words', async t => {
  const kubernetes = await FakeKubernetes.start(t)
  const refusals = ['{"kind":"Status","code":403,"message":"pods is forbidden: User \\"system:anonymous\\" cannot list resource"}', '<html>Forbidden</html>', '{"message":5}']
  const rest = [...refusals]
  kubernetes.instead = (_call, response) => {
    if (rest.length === 0) return false
    response.writeHead(403).end(rest.shift())
    return true
  }
  const following = await follow(t, kubernetes)
  await until(() => kubernetes.watches.length > 0, 'it watches in the end')
  t.same(following.reasons, ['403 pods is forbidden: User "system:anonymous" cannot list resource', '403 <html>Forbidden</html>', '403 {"message":5}'])
})
