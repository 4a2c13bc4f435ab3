import type { WorkerData } from './messages.ts'

const HEARTBEATS_MISSED = 5

/**
 * Options of every socket. Nothing may hang: sends time out, a dead peer is noticed by heartbeats, and closing never waits
 * for unsent bytes (linger).
 */
export function commonOptions (data: WorkerData): { linger: number, ipv6: boolean, heartbeatInterval: number, heartbeatTimeout: number, heartbeatTimeToLive: number } {
  return {
    linger: 0,
    ipv6: data.tcp.startsWith('tcp://['),
    heartbeatInterval: data.heartbeatMs,
    // Generous, as heartbeats queue behind chunks: a slow wire is no dead peer. One that died is noticed by its closed socket.
    heartbeatTimeout: HEARTBEATS_MISSED * data.heartbeatMs,
    heartbeatTimeToLive: (HEARTBEATS_MISSED + 1) * data.heartbeatMs
  }
}
