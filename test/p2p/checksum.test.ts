import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { crc32 } from 'node:zlib'
import t from 'tap'
import { gather, scatter, type BlockMemory } from '../../engines/p2p/block-copy.ts'
import { seeded } from '../helper/random.ts'

const BLOCK_COPY = new URL('../../engines/p2p/block-copy.js', import.meta.url).href

/** Refuses the package, as where it is not installed or has no binary for the machine. */
const WITHOUT = `import Module from 'node:module'
const resolve = Module._resolveFilename
Module._resolveFilename = (name, ...rest) => { if (name === '@node-rs/crc32') throw new Error('no binary'); return resolve(name, ...rest) }`

t.test('checksums of copies are those of zlib, whatever the blocks', async t => {
  const below = seeded(1)
  for (let i = 0; i < 60; i++) {
    const blockBytes = 4 * (1 + below(20_000))
    const memory: BlockMemory = { bytes: new Uint8Array(new SharedArrayBuffer(8 * blockBytes)), blockBytes, numBlocks: 8, dtype: 'float32' }
    for (let at = 0; at < memory.bytes.length; at++) memory.bytes[at] = below(100)
    const blocks = [0, 1, 2, 3, 4, 5, 6, 7].sort(() => below(3) - 1)
    const offset = 4 * below(blockBytes)
    const target = Buffer.alloc(4 * below((8 * blockBytes - offset) / 4))
    const crc = gather(memory, blocks, offset, target)
    if (crc !== crc32(target) || scatter(memory, blocks, offset, target).crc !== crc) t.fail(`copy ${i}: ${crc} and ${crc32(target)}`)
  }
  t.pass('60 copies')
})

t.test('without the package an engine computes them by itself', async t => {
  const memory = 'const memory = { bytes: new Uint8Array(64).fill(7), blockBytes: 16, numBlocks: 4, dtype: "float32" }'
  const { stdout } = await promisify(execFile)(process.execPath, ['--import', `data:text/javascript,${encodeURIComponent(WITHOUT)}`, '--input-type=module', '-e',
    `import { createRequire } from 'node:module'; const { gather } = await import('${BLOCK_COPY}'); ${memory}; console.log(gather(memory, [2, 0], 4, Buffer.alloc(20)), (() => { try { return typeof createRequire('${BLOCK_COPY}')('@node-rs/crc32') } catch { return 'away' } })())`])
  t.equal(stdout.trim(), `${crc32(Buffer.alloc(20, 7))} away`)
})
