import { Peer, type Offer, type PeerOptions } from './peer.ts'

/*
 * An engine's end of the link in a process of its own, driven by messages: for tests that kill one.
 *   { op: 'open', id, options } -> { endpoint }      { op: 'offer', count, seed } -> { name, blocks }
 *   { op: 'connect', endpoint } -> {}                { op: 'pull', name, blocks } -> { ok, bytes?, code? }
 *   { op: 'idle' } -> { idle }                       { op: 'close' }
 */
export type Command =
  | { op: 'open', id: string, options: PeerOptions }
  | { op: 'offer', count: number, seed: number }
  | { op: 'connect', endpoint: Peer['node']['endpoint'] }
  | { op: 'pull', name: Offer['name'], blocks: number[], seed: number }
  | { op: 'idle' }
  | { op: 'close' }

let peer: Peer

async function obey (command: Command): Promise<object> {
  switch (command.op) {
    case 'open': {
      peer = await Peer.open(command.id, command.options)
      return { endpoint: peer.node.endpoint }
    }
    case 'offer': {
      const { name, blocks } = peer.offer(command.count, { seed: command.seed })
      return { name, blocks }
    }
    case 'connect': {
      const { transport } = await peer.node.connect(command.endpoint)
      return { transport }
    }
    case 'pull': {
      const localBlocks = peer.feature.allocate(command.blocks.length) as number[]
      try {
        const { bytes, transport } = await peer.node.pull({ ...command.name, pool: 'feature', remoteBlocks: command.blocks, localBlocks })
        return { equal: peer.holds(localBlocks, command.seed), bytes, transport, ...await peer.node.ack(command.name) }
      } catch (err) {
        return { code: (err as { code: string }).code }
      } finally {
        peer.feature.release(localBlocks)
      }
    }
    case 'idle': return { idle: peer.idle }
    case 'close': {
      await peer.close()
      process.disconnect()
      return {}
    }
    default: return command satisfies never
  }
}

process.on('message', (command: Command) => {
  obey(command).then(
    (answer) => process.connected && process.send?.(answer),
    (err: Error) => process.send?.({ error: err.message, code: (err as { code?: string }).code })
  )
})
