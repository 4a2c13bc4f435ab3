/** Which addresses media may be fetched from: public unicast ones, and nothing an attacker could reach only through us. */
import { BlockList, isIP } from 'node:net'

/** IANA special-purpose ranges that are not global unicast. */
const PRIVATE_V4 = [
  '0.0.0.0/8', '10.0.0.0/8', '100.64.0.0/10', '127.0.0.0/8', '169.254.0.0/16', '172.16.0.0/12', '192.0.0.0/24', '192.0.2.0/24',
  '192.88.99.0/24', '192.168.0.0/16', '198.18.0.0/15', '198.51.100.0/24', '203.0.113.0/24', '224.0.0.0/4', '240.0.0.0/4'
]
/** Inside 2000::/3, where all global unicast addresses are: documentation, Teredo, ORCHID, and 6to4, which embeds any IPv4 address. */
const PRIVATE_V6 = ['2001::/23', '2001:db8::/32', '2002::/16', '3fff::/20']

const blocked = new BlockList()
const globalV6 = new BlockList()
for (const range of PRIVATE_V4) blocked.addSubnet(...split(range), 'ipv4')
for (const range of PRIVATE_V6) blocked.addSubnet(...split(range), 'ipv6')
globalV6.addSubnet('2000::', 3, 'ipv6')

function split (range: string): [string, number] {
  const [address = '', bits] = range.split('/')
  return [address, Number(bits)]
}

/** Is this literal address a public one? IPv4 addresses in IPv6 clothing (mapped, NAT64) are not in 2000::/3 and so are not. */
export function isPublicAddress (address: string): boolean {
  const family = isIP(address)
  if (family === 4) return !blocked.check(address, 'ipv4')
  return family === 6 && globalV6.check(address, 'ipv6') && !blocked.check(address, 'ipv6')
}
