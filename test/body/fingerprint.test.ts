/** Pictures that look alike from outside still have keys of their own, and their encoders share them evenly. */
import sharp from 'sharp'
import t, { type Test } from 'tap'
import { fingerprint, parseBody, parseBodyValue } from '../../plugin/body/index.ts'
import { rank } from '../../plugin/planning/index.ts'
import { seeded } from '../helper/random.ts'

const COUNT = 240
const ENCODERS = Array.from({ length: 8 }, (_, i) => ({ id: `http://10.0.0.${i}:23333` }))
/** Of chi-square with 7 degrees of freedom: an even spread exceeds it once in 10,000 times. */
const BOUND = 29.9

function dataUrl (bytes: Buffer): string {
  return `data:image/jpeg;base64,${bytes.toString('base64')}`
}

async function keyOf (url: string): Promise<string> {
  return (await parseBodyValue({ model: 'm', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url } }] }] })).media[0]!.routeKey
}

async function spreads (t: Test, pictures: readonly Buffer[]): Promise<void> {
  const keys = await Promise.all(pictures.map(async picture => await keyOf(dataUrl(picture))))
  t.equal(new Set(keys).size, pictures.length, 'each has a key of its own')
  const counts = ENCODERS.map(({ id }) => keys.filter(key => rank(key, ENCODERS)[0]!.id === id).length)
  const even = pictures.length / ENCODERS.length
  const chi = counts.reduce((sum, count) => sum + (count - even) ** 2 / even, 0)
  t.ok(chi < BOUND, `spread over encoders: ${counts.join(', ')}`)
}

/** A scene of soft shapes with the noise of a sensor. */
function scene (width: number, height: number, below: (limit: number) => number): Buffer {
  const waves = Array.from({ length: 3 }, () => ({ x: below(100) / 900, y: below(100) / 900, phase: below(628) / 100, by: below(40) }))
  const pixels = Buffer.alloc(width * height * 3)
  for (let i = 0; i < pixels.length; i++) {
    const [x, y] = [Math.floor(i / 3) % width, Math.floor(i / 3 / width)]
    pixels[i] = Math.max(0, Math.min(255, waves.reduce((sum, wave) => sum + wave.by * Math.sin(wave.x * x + wave.y * y + wave.phase + i % 3), 120 + below(12))))
  }
  return pixels
}

t.test('photographs of one camera', async t => {
  const below = seeded(1)
  const exif = { IFD0: { Make: 'Camera', Model: 'One', Artist: 'x'.repeat(3_000) } }
  const photographs = await Promise.all(Array.from({ length: COUNT }, async () => await sharp(scene(80, 60, below), { raw: { width: 80, height: 60, channels: 3 } }).withExif(exif).jpeg().toBuffer()))
  const beginning = photographs[0]!.subarray(0, 3_000)
  t.ok(photographs.every(photograph => photograph.subarray(0, 3_000).equals(beginning)), 'they begin alike')
  await spreads(t, photographs)
})

t.test('tiles of one picture, compressed or not', async t => {
  const [across, size] = [16, 48]
  const [width, height] = [across * size, COUNT / across * size]
  const picture = sharp(scene(width, height, seeded(2)), { raw: { width, height, channels: 3 } })
  const tiles = Array.from({ length: COUNT }, (_, i) => picture.clone().extract({ left: i % across * size, top: Math.floor(i / across) * size, width: size, height: size }))
  await spreads(t, await Promise.all(tiles.map(async tile => await tile.clone().png().toBuffer())))
  await spreads(t, await Promise.all(tiles.map(async tile => await tile.raw().toBuffer())))
})

t.test('scanned pages of one size, white but for some lines, uncompressed', async t => {
  const below = seeded(3)
  await spreads(t, Array.from({ length: COUNT }, () => {
    const page = Buffer.alloc(40_000, 0xff)
    for (let line = 0; line < 20; line++) for (let at = 0; at < 160; at++) if (below(3) === 0) page[line * 2_000 + 20 + at] = 0
    return page
  }))
})

t.test('the key is that of the URL, wherever and however the body has it', async t => {
  const url = dataUrl(Buffer.alloc(30_000, 'picture'))
  const part = { type: 'image_url', image_url: { url } }
  const bodies = [
    JSON.stringify({ model: 'm', messages: [{ role: 'user', content: [part] }] }),
    JSON.stringify({ stream: true, messages: [{ role: 'system', content: 'x' }, { content: [{ type: 'text', text: 'y' }, part], role: 'user' }], model: 'm' }, undefined, 2),
    JSON.stringify({ model: 'm', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: url }] }] }),
    JSON.stringify({ model: 'm', input: [{ role: 'user', content: [{ type: 'input_image', image_url: url }] }] })
  ]
  const keys = await Promise.all(bodies.map(async body => (await parseBody(Buffer.from(body))).media[0]!.routeKey))
  t.equal(new Set(keys).size, 1)
  t.equal(keys[0], fingerprint(Buffer.from(url)))
})

t.test('texts of any length have a key, and a change at either end, or of the length, changes it', async t => {
  for (const length of [0, 1, 31, 2_175, 2_176, 2_177, 2_200, 10_000]) {
    const text = Buffer.alloc(length, 'abc')
    const others = [Buffer.concat([text, Buffer.from('a')]), ...(length === 0 ? [] : [0, length - 1, Math.max(0, length - 100)].map(at => { const other = Buffer.from(text); other[at]! ^= 1; return other }))]
    for (const other of others) t.not(fingerprint(other), fingerprint(text), `${length} bytes`)
    t.equal(fingerprint(Buffer.concat([Buffer.from('>'), text, Buffer.from('<')]), 1, length + 1), fingerprint(text))
  }
})
