import sharp from 'sharp'
import t from 'tap'
import { pictureMaker } from '../../../plugin/cli/bench/pictures.ts'

const bytesOf = (url: string): Buffer => Buffer.from(url.slice(url.indexOf(',') + 1), 'base64')

t.test('pictures of every size are whole, of that size, and all different', async t => {
  for (const [width, height] of [[1, 1], [3, 5], [4, 4], [17, 9], [448, 448], [640, 31], [8_192, 6]] as const) {
    for (const format of ['png', 'jpeg'] as const) {
      const picture = await pictureMaker({ seed: 3, width, height, format })
      const urls = await Promise.all([0, 1, 2].map(picture))
      t.equal(new Set(urls).size, 3)
      t.ok(urls.every(url => url.startsWith(`data:image/${format};base64,`)))
      const { info, data } = await sharp(bytesOf(urls[0]!), { failOn: 'warning' }).raw().toBuffer({ resolveWithObject: true })
      t.match(info, { width, height, channels: 3 })
      if (width > 100) t.ok(new Set(data).size > 100, 'it has many shades')
      t.equal(await picture(0), urls[0], 'the same again')
    }
  }
})

t.test('a picture has about as many bytes as a photo', async t => {
  const picture = await pictureMaker({ seed: 1, width: 448, height: 448, format: 'png' })
  const { length } = bytesOf(await picture(0))
  t.ok(length > 20_000 && length < 150_000, `${length} bytes`)
})

t.test('pictures that share a ground differ in their pixels too', async t => {
  const picture = await pictureMaker({ seed: 1, width: 32, height: 32, format: 'png' })
  const pixels = await Promise.all(Array.from({ length: 40 }, async (_, id) => (await sharp(bytesOf(await picture(id))).raw().toBuffer()).toString('latin1')))
  t.equal(new Set(pixels).size, 40)
})
