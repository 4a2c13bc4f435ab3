import { createServer, Packet } from 'dns2'
import type { Test } from 'tap'

/** What a name has. Addresses with a colon are AAAA records. */
export interface Zone {
  readonly addresses?: readonly string[]
  readonly services?: ReadonlyArray<{ readonly target: string, readonly port: number }>
  /** Seconds. */
  readonly ttl?: number
}

export interface DnsServer {
  /** For the option `server`. */
  readonly address: string
  readonly zones: Map<string, Zone>
  /** Answers SERVFAIL. */
  failing: boolean
  /** Questions that have come, by name. */
  readonly asked: Map<string, number>
}

/** A name server on loopback, whose zones the test changes. */
export async function startDns (t: Test): Promise<DnsServer> {
  const state = { zones: new Map<string, Zone>(), failing: false, asked: new Map<string, number>() }
  const server = createServer({
    udp: true,
    handle: (request, send) => {
      const response = Packet.createResponseFromRequest(request)
      const [question] = request.questions as Array<{ name: string, type: number }>
      const { name, type } = question!
      state.asked.set(name, (state.asked.get(name) ?? 0) + 1)
      const zone = state.zones.get(name)
      const { ttl = 1 } = zone ?? {}
      const header = response.header as { rcode: number }
      if (state.failing) header.rcode = 2
      else if (zone === undefined) header.rcode = 3
      for (const address of zone?.addresses ?? []) {
        const kind = address.includes(':') ? Packet.TYPE.AAAA : Packet.TYPE.A
        if (kind === type && !state.failing) response.answers.push(new Packet.Resource({ name, type, class: Packet.CLASS.IN, ttl, address }))
      }
      for (const { target, port } of zone?.services ?? []) {
        if (type === Packet.TYPE.SRV && !state.failing) response.answers.push(new Packet.Resource({ name, type, class: Packet.CLASS.IN, ttl, priority: 0, weight: 1, port, target }))
      }
      send(response)
    }
  })
  t.teardown(async () => { await server.close() })
  const { udp } = await server.listen({ udp: { port: 0, address: '127.0.0.1' } })
  return Object.assign(state, { address: `127.0.0.1:${udp!.port}` })
}
