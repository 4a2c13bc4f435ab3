import { createHash } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { hostname, userInfo } from 'node:os'
import { isObject, objectOf } from '../../adapters/wire/json.ts'
import { P2PError, type P2PEndpointInfo, type PoolInfo, type Transport } from './types.ts'

/** Equal on two engines of one host (same boot, same name: a container is a host of its own) that run as one user. */
export function hostId (): string {
  let boot = ''
  try { boot = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim() } catch { /* not Linux: the name has to do */ }
  return createHash('sha256').update(`${boot}\n${hostname()}\n${userInfo().uid}`).digest('hex').slice(0, 16)
}

/**
 * Reads an endpoint as it came over HTTP: an object, or its JSON text. Throws P2PError REFUSED saying what is wrong.
 */
export function parseEndpoint (value: unknown): P2PEndpointInfo {
  let info = value
  if (typeof info === 'string') {
    try { info = JSON.parse(info) } catch (cause) { throw new P2PError('REFUSED', 'endpoint_info is not JSON', { cause }) }
  }
  const fields = objectOf(info)
  if (fields.v !== 1) throw new P2PError('REFUSED', `the peer speaks version ${String(fields.v)} of the P2P protocol, this engine 1`)
  const strings = ['engine', 'host_id', 'tcp', 'fingerprint'] as const
  for (const name of strings) if (typeof fields[name] !== 'string') throw new P2PError('REFUSED', `endpoint_info.${name} must be a string`)
  if (!Number.isSafeInteger(fields.epoch)) throw new P2PError('REFUSED', 'endpoint_info.epoch must be an integer')
  if (!/^tcp:\/\/.+:\d+$/.test(fields.tcp as string)) throw new P2PError('REFUSED', 'endpoint_info.tcp must be tcp://host:port')
  for (const name of ['ipc', 'curve'] as const) {
    if (fields[name] !== null && typeof fields[name] !== 'string') throw new P2PError('REFUSED', `endpoint_info.${name} must be a string or null`)
  }
  if (!isObject(fields.pools)) throw new P2PError('REFUSED', 'endpoint_info.pools must be an object')
  return fields as unknown as P2PEndpointInfo
}

/** Throws P2PError REFUSED, with the reason, unless blocks of one engine mean the same in the other. */
export function checkCompatible (own: P2PEndpointInfo, remote: P2PEndpointInfo, allowedPeers: ReadonlySet<string>): void {
  const refuse = (reason: string): never => { throw new P2PError('REFUSED', `${remote.engine}: ${reason}`) }
  if (remote.fingerprint !== own.fingerprint) refuse('serves another model (fingerprints differ)')
  if ((remote.curve === null) !== (own.curve === null)) {
    refuse(remote.curve === null ? 'has no CURVE keys, this engine requires them' : 'requires CURVE keys, this engine has none')
  }
  if (remote.curve !== null && !allowedPeers.has(remote.curve)) refuse('its public key is not among the allowed peers')
  let common = 0
  for (const name of ['feature', 'kv'] as const) {
    const [mine, theirs] = [own.pools[name], remote.pools[name]]
    if (mine === undefined || theirs === undefined) continue
    common++
    const difference = shapeDifference(mine, theirs)
    if (difference !== undefined) refuse(`${name} blocks differ: ${difference}`)
  }
  if (common === 0) refuse('no kind of block in common')
}

function shapeDifference (mine: PoolInfo, theirs: PoolInfo): string | undefined {
  const [a, b] = [new Map(Object.entries(mine)), new Map(Object.entries(theirs))]
  for (const key of new Set([...a.keys(), ...b.keys()])) {
    if (key !== 'num_blocks' && a.get(key) !== b.get(key)) return `${key} is ${String(b.get(key))} there, ${String(a.get(key))} here`
  }
  return undefined
}

/** ipc where both ends share a host and the socket file can be seen from here, else tcp. */
export function chooseAddress (own: P2PEndpointInfo, remote: P2PEndpointInfo): { transport: Transport, address: string } {
  const usable = own.ipc !== null && remote.ipc !== null && own.host_id === remote.host_id &&
    existsSync(remote.ipc.slice('ipc://'.length))
  return usable ? { transport: 'ipc', address: remote.ipc as string } : { transport: 'tcp', address: remote.tcp }
}
