import type { CurveKeys } from '../../engines/p2p/index.ts'

/**
 * Key pairs for tests. Fixed, so that the test's main thread does not load zeromq: what zeromq holds in a process is freed
 * when its last user ends, and a test of leaks wants that to be the transfer workers.
 */
export const KEYS: readonly [CurveKeys, CurveKeys, CurveKeys, CurveKeys] = [
  { publicKey: 'coM<PkH3Q!8BT7bFBNbaj<37i9.C2hFsaq6gvuH@', secretKey: 'eGfDGd!:EBkp+ew+8uV3ZVA8Wc}dZHxpKkRf51Q?' },
  { publicKey: 'RJ$rnmSaH]1eD>-zKeTN?1JhD<SCi[XydxS+4xfq', secretKey: '-$.a1hsk/Bmj.z):@7q08dVm@DDv4LbQXk0d&:NH' },
  { publicKey: '}RZ.J19(8Rht[I$EajP5c9o7lvT1MeCy<DS[*Pff', secretKey: '-d#ga42tEYdzMp/)DQ:-SX2gyd0Ek+sqMYXuC4r/' },
  { publicKey: '^$OV]OPJ1W}DA/3eYf3-6?V5DG8-RZt[FGI43qns', secretKey: 'xp5>e9b(^]*xeTPq!2qn+se23rgn]$Q#QJpkduk@' }
]
