/** The gateway's byte scanner and the engines' parser find the same media: in every spelling, by every role, on every route. */
import t from 'tap'
import { isObject, type Json } from '../../adapters/wire/json.ts'
import { isEmbedded, MEDIA, mediaUrl, partsOf } from '../../adapters/wire/media.ts'
import { collectMedia } from '../../engines/encoder/media-parts.ts'
import { parseBody } from '../../plugin/body/index.ts'
import { APART_PLACES, LOOSE_MEDIA, NONE, ONE, PICTURE, PLACES, PNG } from '../helper/media-spellings.ts'
import { Random } from './random-json.ts'

interface Found { path: string, type: string, url: string | undefined }

async function byGateway (text: string): Promise<Found[]> {
  const { bytes, media } = await parseBody(Buffer.from(text))
  return media.map(({ path, type, url: { start, end } }) => ({ path, type, url: end > start ? JSON.parse(`"${bytes.toString('utf8', start, end)}"`) as string : undefined }))
}

function byEngines (text: string): Found[] {
  return [...partsOf(JSON.parse(text) as Json)].filter(({ type }) => type !== undefined).map(({ path, type, part }) => ({ path, type: type!, url: mediaUrl(part as Json, type!)?.url }))
}

t.test('every spelling, alone in every place, is one item for both', async t => {
  const random = new Random(17)
  for (const [place, { member, wrap }] of Object.entries({ ...PLACES, ...APART_PLACES })) {
    for (const [spelling, part] of Object.entries(ONE)) {
      const text = random.spaced({ model: 'm', [member]: wrap([{ type: 'text', text: 'a' }, part]) })
      const found = await byGateway(text)
      if (found.length !== 1) t.fail(`${place}, ${spelling}: ${found.length} items`, { text })
      t.same(found, byEngines(text), `${place}, ${spelling}`)
      const { type, url } = found[0]!
      if (place in PLACES && !/alone$|document/.test(place) && MEDIA.get(type) === 'image' && !isEmbedded(type) && url !== undefined) t.same(collectMedia(JSON.parse(text)).map(item => item.param), found.map(item => item.path))
    }
    for (const [spelling, part] of Object.entries(NONE)) {
      const text = random.spaced({ model: 'm', [member]: wrap([part]) })
      t.same([await byGateway(text), byEngines(text)], [[], []], `${place}, ${spelling}`)
    }
  }
})

t.test('bodies of many parts and messages in any mixture hold the same items in the same order for both', async t => {
  const random = new Random(4)
  const spellings = [...Object.values(ONE), ...Object.values(NONE), { type: 'image_url', image_url: PICTURE, content: [ONE.image] }, { content: [ONE.image_url, ONE.image], type: 'image', image: PICTURE }]
  const places = [...Object.values(PLACES), ...Object.values(APART_PLACES)]
  let items = 0
  for (let i = 0; i < 400; i++) {
    const { member } = random.pick(places)
    const values = Array.from({ length: random.below(5) }, () => random.pick(places.filter(place => place.member === member)).wrap(Array.from({ length: random.below(5) }, () => shuffled(random, random.pick(spellings)))))
    const more = random.below(3) === 0 ? random.pick(LOOSE_MEDIA)[1] : {}
    const text = random.spaced(Object.fromEntries(random.shuffle(Object.entries({ model: 'm', stream: false, ...more, [member]: [...values.flat(), 'odd', { role: 'user', content: 'text' }] }))))
    const found = await byGateway(text)
    items += found.length
    const wanted = byEngines(text)
    if (JSON.stringify(found) !== JSON.stringify(wanted)) t.same(found, wanted, text)
  }
  t.ok(items > 500, `${items} items`)
})

t.test('nests of the grammar\'s names in any order and place hold the same items for both, and are spliced as JSON', async t => {
  const random = new Random(6)
  const top = ['messages', 'input', 'documents', 'system', 'image_data', 'query', 'text_2', 'inputs', 'video_data', 'prompt', 'metadata']
  const names = ['content', 'output', 'source', 'type', 'image', 'image_url', 'url', 'data', 'role', 'uuid', 'text', 'video', 'image_embeds', 'input_audio', 'x']
  const texts = ['image_url', 'image', 'text', 'input_image', 'tool_result', 'document', 'content', 'https://a/b.png', PNG, 'user', '']
  const object = (keys: readonly string[], depth: number): Json => Object.fromEntries(Array.from({ length: random.below(5) }, () => [random.pick(keys), value(depth)]))
  const value = (depth: number): unknown => {
    const kind = random.below(depth > 0 ? 8 : 4)
    if (kind < 3) return random.pick(texts)
    if (kind < 4) return random.pick([null, 1, true, false])
    return kind < 6 ? Array.from({ length: random.below(4) }, () => value(depth - 1)) : object(names, depth - 1)
  }
  let items = 0
  for (let i = 0; i < 1_500; i++) {
    const body = { ...object(top, 7), model: 'm' }
    const text = random.spaced(body)
    const found = await byGateway(text)
    const wanted = byEngines(text).map(one => one.url === '' ? { ...one, url: undefined } : one)
    items += found.length
    if (JSON.stringify(found) !== JSON.stringify(wanted)) t.same(found, wanted, text)
    const parsed = await parseBody(Buffer.from(text))
    const spliced = JSON.stringify(JSON.parse(Buffer.concat(parsed.splice({ set: { n: '1' } })).toString()))
    if (spliced !== JSON.stringify({ ...body, n: 1 })) t.equal(spliced, JSON.stringify({ ...body, n: 1 }), text)
    const { media } = await parseBody(Buffer.concat(parsed.splice({ mediaUrls: parsed.media.map(() => 'https://c/d') })))
    if (media.length !== found.length) t.equal(media.length, found.length, text)
  }
  t.ok(items > 500, `${items} items`)
})

t.test('a screenshot is the one part of a computer\'s output', async t => {
  const text = JSON.stringify({ model: 'm', input: [{ type: 'computer_call_output', call_id: 'c', output: { type: 'computer_screenshot', image_url: PICTURE } }] })
  t.same(await byGateway(text), [{ path: 'input[0].output', type: 'computer_screenshot', url: PICTURE }])
  t.same(byEngines(text), await byGateway(text))
})

t.test('items of every route are spliced and picked in place', async t => {
  for (const [place, { member, wrap }] of Object.entries(PLACES)) {
    const value = { [member]: wrap([ONE.image_embeds, ONE['image with source, base64'], { type: 'text', text: 'x' }, ONE.input_image]), model: 'm' }
    const body = await parseBody(Buffer.from(JSON.stringify(value)))
    t.equal(body.media.length, 3)
    const spliced = Buffer.concat(body.splice({ mediaUrls: ['epd:0', 'epd:1', 'epd:2'] })).toString()
    t.equal(spliced, JSON.stringify(value).replace(`"data":"${PNG}"`, '"data":"epd:1"').replace(`"image_url":"${PICTURE}"`, '"image_url":"epd:2"'), place)
    const picked = JSON.parse(Buffer.concat(body.pick(body.media.slice(1))).toString()) as Json
    t.same(picked, { model: 'm', messages: [{ role: 'user', content: [PICTURE, PICTURE].map(url => ({ type: 'image_url', image_url: { url } })) }] }, `${place}: as a chat has them`)
    t.equal(collectMedia(picked).length, 2, 'an encoder reads them')
  }
})

t.test('media that stand alone are as many for both, and no engine of ours takes what stands outside of messages', async t => {
  const random = new Random(5)
  for (const [items, more] of LOOSE_MEDIA) {
    const text = random.spaced({ model: 'm', prompt: 'x', ...more })
    const found = await byGateway(text)
    t.equal(found.length, items, text)
    t.same(found.map(({ path, type }) => ({ path, type })), byEngines(text).map(({ path, type }) => ({ path, type })), text)
    const { media } = await parseBody(Buffer.from(text))
    t.ok(media.every(item => item.unencodable !== undefined))
    if (items > 0) t.throws(() => collectMedia({ ...more, messages: [] }), { code: 'unsupported', param: found[0]!.path })
  }
  for (const [place, { member, wrap }] of Object.entries(APART_PLACES)) {
    const { media } = await parseBody(Buffer.from(JSON.stringify({ model: 'm', [member]: wrap([ONE.image]) })))
    t.same(media.map(({ unencodable }) => unencodable), ['media outside of messages'], place)
    if (member !== 'input') t.throws(() => collectMedia({ messages: [], [member]: wrap([ONE.image]) }), { code: 'unsupported', param: media[0]!.path }, place)
  }
  await t.rejects(parseBody(Buffer.from(JSON.stringify({ model: 'm', image_data: ['epd:a'] }))), { code: 'EPD_ERR_INVALID_MEDIA', param: 'image_data[0]' })
  await t.rejects(parseBody(Buffer.from(JSON.stringify({ model: 'm', documents: [{ content: [{ type: 'image_url', image_url: { url: 'epd:a' } }] }] }))), { code: 'EPD_ERR_INVALID_MEDIA', param: 'documents[0].content[0]' })
})

/** The same members in another order. */
function shuffled (random: Random, part: unknown): unknown {
  return isObject(part) ? Object.fromEntries(random.shuffle(Object.entries(part))) : part
}
