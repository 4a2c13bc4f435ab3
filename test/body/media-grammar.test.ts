/** The gateway's byte scanner and the engines' parser find the same media: in every spelling, by every role, on every route. */
import t from 'tap'
import { isObject, type Json } from '../../adapters/wire/json.ts'
import { isEmbedded, MEDIA, mediaUrl, partsOf } from '../../adapters/wire/media.ts'
import { collectMedia } from '../../engines/encoder/media-parts.ts'
import { parseBody } from '../../plugin/body/index.ts'
import { NONE, ONE, PICTURE, PLACES, PNG } from '../helper/media-spellings.ts'
import { Random } from './random-json.ts'

interface Found { path: string, type: string, url: string | undefined }

async function byGateway (text: string): Promise<Found[]> {
  const { bytes, media } = await parseBody(Buffer.from(text))
  return media.map(({ path, type, url: { start, end }, unencodable }) => ({ path, type, url: unencodable === undefined ? JSON.parse(`"${bytes.toString('utf8', start, end)}"`) as string : undefined }))
}

function byEngines (text: string): Found[] {
  return [...partsOf(JSON.parse(text) as Json)].filter(({ type }) => type !== undefined).map(({ path, type, part }) => ({ path, type: type!, url: mediaUrl(part as Json, type!)?.url }))
}

t.test('every spelling, alone in every place, is one item for both', async t => {
  const random = new Random(17)
  for (const [place, { list, wrap }] of Object.entries(PLACES)) {
    for (const [spelling, part] of Object.entries(ONE)) {
      const text = random.spaced({ model: 'm', [list]: [wrap([{ type: 'text', text: 'a' }, part])] })
      const found = await byGateway(text)
      if (found.length !== 1) t.fail(`${place}, ${spelling}: ${found.length} items`, { text })
      t.same(found, byEngines(text), `${place}, ${spelling}`)
      const { type, url } = found[0]!
      if (MEDIA.get(type) === 'image' && !isEmbedded(type) && url !== undefined) t.same(collectMedia(JSON.parse(text)).map(item => item.param), found.map(item => item.path))
    }
    for (const [spelling, part] of Object.entries(NONE)) {
      const text = random.spaced({ model: 'm', [list]: [wrap([part])] })
      t.same([await byGateway(text), byEngines(text)], [[], []], `${place}, ${spelling}`)
    }
  }
})

t.test('bodies of many parts and messages in any mixture hold the same items in the same order for both', async t => {
  const random = new Random(4)
  const spellings = [...Object.values(ONE), ...Object.values(NONE), { type: 'image_url', image_url: PICTURE, content: [ONE.image] }, { content: [ONE.image_url, ONE.image], type: 'image', image: PICTURE }]
  const places = Object.values(PLACES)
  let items = 0
  for (let i = 0; i < 400; i++) {
    const { list } = random.pick(places)
    const messages = Array.from({ length: random.below(5) }, () => random.pick(places.filter(place => place.list === list)).wrap(Array.from({ length: random.below(5) }, () => shuffled(random, random.pick(spellings)))))
    const text = random.spaced(Object.fromEntries(random.shuffle(Object.entries({ model: 'm', stream: false, [list]: [...messages, 'odd', { role: 'user', content: 'text' }] }))))
    const found = await byGateway(text)
    items += found.length
    const wanted = byEngines(text)
    if (JSON.stringify(found) !== JSON.stringify(wanted)) t.same(found, wanted, text)
  }
  t.ok(items > 500, `${items} items`)
})

t.test('a screenshot is the one part of a computer\'s output', async t => {
  const text = JSON.stringify({ model: 'm', input: [{ type: 'computer_call_output', call_id: 'c', output: { type: 'computer_screenshot', image_url: PICTURE } }] })
  t.same(await byGateway(text), [{ path: 'input[0].output', type: 'computer_screenshot', url: PICTURE }])
  t.same(byEngines(text), await byGateway(text))
})

t.test('items of every route are spliced and picked in place', async t => {
  for (const [place, { list, wrap }] of Object.entries(PLACES)) {
    const value = { [list]: [wrap([ONE.image_embeds, ONE['image with source, base64'], { type: 'text', text: 'x' }, ONE.input_image])], model: 'm' }
    const body = await parseBody(Buffer.from(JSON.stringify(value)))
    t.equal(body.media.length, 3)
    const spliced = Buffer.concat(body.splice({ mediaUrls: ['epd:0', 'epd:1', 'epd:2'] })).toString()
    t.equal(spliced, JSON.stringify(value).replace(`"data":"${PNG}"`, '"data":"epd:1"').replace(`"image_url":"${PICTURE}"`, '"image_url":"epd:2"'), place)
    const picked = JSON.parse(Buffer.concat(body.pick(body.media.slice(1))).toString()) as Json
    t.same(picked, { model: 'm', messages: [{ role: 'user', content: [PICTURE, PICTURE].map(url => ({ type: 'image_url', image_url: { url } })) }] }, `${place}: as a chat has them`)
    t.equal(collectMedia(picked).length, 2, 'an encoder reads them')
  }
})

/** The same members in another order. */
function shuffled (random: Random, part: unknown): unknown {
  return isObject(part) ? Object.fromEntries(random.shuffle(Object.entries(part))) : part
}
