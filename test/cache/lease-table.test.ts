import t from 'tap'
import { LeaseTable, type Lease, type LeaseEnd, type PullTicket } from '../../engines/cache/index.ts'
import { until } from '../helper/until.ts'
import { seeded } from '../helper/random.ts'

const full = process.env.EPD_TEST_FULL === '1'

function opened (table: LeaseTable, ttlMs = 60_000): { lease: Lease, ends: LeaseEnd[] } {
  const ends: LeaseEnd[] = []
  const lease = table.open({ consumer: 'pd', pool: 'feature', blocks: [1, 2], ttlMs, onEnd: (reason) => ends.push(reason) })
  return { lease, ends }
}

t.test('a lease is found by its id and its session, and ends once', async (t) => {
  const table = new LeaseTable(7)
  const [{ lease, ends }, other] = [opened(table), opened(table)]
  t.match(lease.id, /^[0-9a-f]{16}$/)
  t.not(lease.sessionId, other.lease.sessionId)
  t.equal(table.get(lease.id), lease)
  t.equal(table.bySession(lease.sessionId), lease)
  t.equal(table.openCount, 2)
  t.equal(table.end(lease.id, 'ack'), true)
  t.equal(table.end(lease.id, 'release'), false)
  t.equal(table.end('unknown', 'release'), false)
  t.same(ends, ['ack'])
  t.equal(table.bySession(lease.sessionId), undefined)
  table.close()
  t.same(other.ends, ['release'])
  t.equal(table.openCount, 0)
})

t.test('a pull is for the right process and an open lease only', async (t) => {
  const table = new LeaseTable(7)
  const { lease } = opened(table)
  t.equal(table.beginPull(lease.id, 8), 'STALE')
  t.equal(table.beginPull('unknown', 7), 'GONE')
  table.end(lease.id, 'release')
  t.equal(table.beginPull(lease.id, 7), 'GONE')
})

t.test('a lease expires by itself, but not under a pull, and its blocks wait for the last one', async (t) => {
  const table = new LeaseTable(7)
  const short = opened(table, 10)
  await until(() => short.ends.length > 0, 'it expires')
  t.same(short.ends, ['expired'])
  const { lease, ends } = opened(table, 15)
  const [one, two] = [table.beginPull(lease.id, 7), table.beginPull(lease.id, 7)] as [PullTicket, PullTicket]
  const later = opened(table, 30)
  await until(() => later.ends.length > 0, 'a later one expires')
  t.same(ends, [], 'the pulled one does not')
  table.endPull(one)
  t.equal(table.end(lease.id, 'ack'), true)
  t.same(ends, [], 'the second pull reads on')
  t.equal(table.openCount, 1)
  table.endPull(two)
  t.same(ends, ['ack'])
  t.equal(table.openCount, 0)
  t.throws(() => table.endPull(two), /no pull to end/)
})

t.test('every lease ends exactly once under any order of calls', async (t) => {
  for (let seed = 1; seed <= (full ? 200 : 20); seed++) {
    const random = seeded(seed)
    const table = new LeaseTable(1)
    const leases: Array<{ lease: Lease, ends: LeaseEnd[] }> = []
    const tickets: PullTicket[] = []
    for (let step = 0; step < 200; step++) {
      const some = leases[random(leases.length || 1)]
      const what = random(4)
      if (what === 0 || some === undefined) {
        leases.push(opened(table))
      } else if (what === 1) {
        const ticket = table.beginPull(some.lease.id, 1)
        if (typeof ticket !== 'string') tickets.push(ticket)
      } else if (what === 2) {
        const [ticket] = tickets.splice(random(tickets.length || 1), 1)
        if (ticket !== undefined) table.endPull(ticket)
      } else {
        table.end(some.lease.id, random(2) === 0 ? 'ack' : 'release')
      }
      for (const { lease } of tickets) if (leases.find((one) => one.lease === lease)?.ends.length !== 0) t.fail(`seed ${seed}: blocks were freed under a pull`)
      if (table.openCount !== leases.filter(({ ends }) => ends.length === 0).length) t.fail(`seed ${seed}: openCount is wrong`)
    }
    table.close()
    for (const ticket of tickets) table.endPull(ticket)
    t.ok(leases.every(({ ends }) => ends.length === 1), `seed ${seed}`)
    t.equal(table.openCount, 0)
  }
})

t.test('session numbers can\'t be guessed from one another', t => {
  const table = new LeaseTable(1)
  const ids = Array.from({ length: 50 }, () => table.open({ consumer: '', pool: 'feature', blocks: [], ttlMs: 1000, onEnd: () => {} }).sessionId)
  t.ok(ids.every(id => Number.isSafeInteger(id) && id > 0))
  t.equal(new Set(ids).size, 50)
  t.notOk(ids.some((id, i) => Math.abs(id - (ids[i - 1] ?? 0)) < 1000))
  table.close()
  t.end()
})
