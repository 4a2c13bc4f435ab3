/** Pictures as servers in Python read them: what Pillow made of each, recorded offline into test/fixtures/pillow.json. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { bmpSize, decodeBmp } from '../../engines/models/bmp.ts'
import { openPicture } from '../../engines/models/picture.ts'
import { packageRoot } from '../helper/package-root.ts'

/** `pixels`: RGB bytes in base64, RGBA where Pillow has an alpha channel in a BMP; other transparency is laid on white. */
interface Recorded { readonly name: string, readonly bytes: string, readonly size?: readonly [number, number], readonly pixels?: string, readonly error?: string }

const recorded = JSON.parse(readFileSync(join(packageRoot(), 'test/fixtures/pillow.json'), 'utf8')) as { readonly bmp: readonly Recorded[], readonly pictures: readonly Recorded[] }
const decoded = (text: string | undefined): Buffer => Buffer.from(text!, 'base64')

/** Pillow refuses it; the picture is whole. */
const TAKEN_ANYWAY = new Set(['PNG with a wrong checksum in a text chunk'])
/** Decoders round differently. CMYK's colours depend on the profile that a decoder takes for it. */
const toleranceFor = (name: string): number => name.includes('CMYK') ? 25 : 6

t.test('every BMP that Pillow reads has the same pixels', async t => {
  for (const { name, bytes, size, pixels, error } of recorded.bmp) {
    if (error !== undefined) {
      t.throws(() => decodeBmp(decoded(bytes)), { name: 'PictureError' }, name)
      continue
    }
    const { width, height, data } = decodeBmp(decoded(bytes))
    t.same([width, height], size, name)
    t.same([...data], [...decoded(pixels)], name)
    t.same(bmpSize(decoded(bytes)), { width, height }, name)
  }
})

t.test('what Pillow reads is read, with the same colours, and what it refuses is refused', async t => {
  for (const { name, bytes, size, pixels, error } of [...recorded.pictures, ...recorded.bmp.filter(one => one.pixels !== undefined && decoded(one.pixels).length === one.size![0] * one.size![1] * 3)]) {
    const read = async (): Promise<Uint8Array> => {
      const picture = await openPicture(decoded(bytes))
      if (size !== undefined) t.same(picture.size, { width: size[0], height: size[1] }, name)
      return await picture.resize(picture.size)
    }
    if (error !== undefined && !TAKEN_ANYWAY.has(name)) {
      await t.rejects(read(), { name: 'PictureError' }, name)
      continue
    }
    const ours = await read()
    if (pixels === undefined) continue
    const theirs = decoded(pixels)
    t.equal(ours.length, theirs.length, name)
    const apart = ours.reduce((sum, value, i) => sum + Math.abs(value - theirs[i]!), 0) / ours.length
    t.ok(apart <= toleranceFor(name), `${name}: ${apart.toFixed(2)} apart`)
  }
})

t.test('bytes that are almost a BMP are refused, and no header makes a large picture of a few', async t => {
  const good = decoded(recorded.bmp.find(one => one.name === 'RLE8')!.bytes)
  for (let at = 0; at < 54; at++) {
    for (const value of [0, 1, 0x7f, 0xff]) {
      const bytes = Buffer.from(good)
      bytes[at] = value
      await openPicture(bytes).then(picture => picture.size, (err: Error) => { if (err.name !== 'PictureError') t.fail(`byte ${at} = ${value}: ${err.stack}`) })
    }
  }
  const bomb = Buffer.from(good)
  bomb.writeInt32LE(10_000, 18)
  bomb.writeInt32LE(10_000, 22)
  await t.rejects(openPicture(bomb), { name: 'PictureError', message: /too large: 10000x10000/ })
})
