import t from 'tap'
import { CONTROL_FIELDS, fingerprint, parseBody, parseBodyValue } from '../../plugin/body/index.ts'
import { isEpdError } from '../../plugin/errors.ts'
import type { Body } from '../../plugin/body/index.ts'
import { randomJson, Random } from './random-json.ts'

const FULL = process.env.EPD_TEST_FULL === '1'

function chat (...content: unknown[]): Record<string, unknown> {
  return { model: 'm', messages: [{ role: 'user', content }] }
}
function picture (url: string): unknown {
  return { type: 'image_url', image_url: { url } }
}
function joined (chunks: Buffer[]): unknown {
  return JSON.parse(Buffer.concat(chunks).toString())
}
interface Refused { readonly statusCode: number, readonly code: string, readonly param: string | undefined, readonly offset: number, readonly message: string }
function refusedBy (error: unknown): Refused {
  if (!isEpdError(error)) throw error
  const { statusCode, clientCode, param, message } = error
  return { statusCode, code: clientCode, param, message, offset: Number(/at byte (\d+)$/.exec(message)?.[1] ?? 0) }
}
async function refusal (json: unknown): Promise<Refused> {
  try {
    await parseBodyValue(json)
  } catch (error) {
    return refusedBy(error)
  }
  throw new Error(`not refused: ${String(typeof json === 'string' ? json : JSON.stringify(json)).slice(0, 200)}`)
}

t.test('reads what the core needs to know of a request', async t => {
  const body = await parseBodyValue({ model: 'a/b', stream: true, n: 2, temperature: 1e-3, stop: null, user: 'J\u00fcrgen "x"', tools: [], ok: false, messages: [] })
  t.equal(body.model, 'a/b')
  t.equal(body.stream, true)
  t.strictSame([body.scalar('n'), body.scalar('temperature'), body.scalar('stop'), body.scalar('user'), body.scalar('ok')],
    [2, 1e-3, null, 'J\u00fcrgen "x"', false])
  t.strictSame([body.scalar('tools'), body.scalar('absent'), body.has('tools'), body.has('absent')], [undefined, undefined, true, false])
  t.equal((await parseBodyValue({ model: 'm', stream: null })).stream, false)
  const untouched = Buffer.from(' {"model" : "m" }\n')
  t.equal((await parseBody(untouched)).splice({})[0], untouched, 'without edits the very bytes go upstream')
})

t.test('names the member that is missing or of the wrong type', async t => {
  t.match(await refusal({ messages: [] }), { statusCode: 400, code: 'missing_value', param: 'model' })
  for (const model of ['', 3, null, ['m'], { a: 1 }]) t.match(await refusal({ model }), { code: 'invalid_value', param: 'model' })
  for (const stream of ['true', 1, [], {}]) t.match(await refusal({ model: 'm', stream }), { code: 'invalid_value', param: 'stream' })
  for (const text of ['[]', '"x"', '1', 'null', '[{"model":"m"}]']) t.match(await refusal(text), { code: 'invalid_json', offset: 0 })
  t.match(await refusal(undefined), { code: 'invalid_json' })
})

t.test('says at which byte JSON is broken', async t => {
  const cases: Array<[string, number]> = [
    ['', 0], ['   ', 3], ['{', 1], ['{"model":"m"', 12], ['{"model":"m"} x', 14], ['{"model":"m"}{}', 13], ['{"model" "m"}', 9],
    ['{"model":"m",}', 13], ['{,}', 1], ['{"a":[1,]}', 8], ['{"a":[1 2]}', 8], ['{"a":01}', 6], ['{"a":-}', 6], ['{"a":1.}', 7], ['{"a":1e+}', 8],
    ['{"a":.5}', 5], ['{"a":+1}', 5], ['{"a":tru}', 5], ['{"a":nul', 5], ['{"a":NaN}', 5], ['{a:1}', 1], ["{'a':1}", 1], ['{"a":"\t"}', 6],
    ['{"a":"\\x"}', 6], ['{"a":"\\u12g4"}', 6], ['{"a":"', 6], ['{"a":"bc', 8], ['{"a":"\\', 6], ['{"a":]}', 5], ['{"a":[}', 6], ['{"a":1]', 6], ['\ufeff{}', 0], ['{"a":1}\0', 7]
  ]
  for (const [text, offset] of cases) {
    const error = await refusal(text)
    t.match(error, { statusCode: 400, code: 'invalid_json', offset }, JSON.stringify(text))
  }
  const long = 'A'.repeat(3_000_000)
  t.match(await refusal(`{"model":"m","x":"${long}\n"}`), { code: 'invalid_json', offset: 18 + long.length })
  t.match(await refusal(`{"model":"m","x":"${long}`), { code: 'invalid_json', offset: 18 + long.length })
  t.match(await refusal(`{"model":"m","x":"${long}\\q"}`), { code: 'invalid_json', offset: 18 + long.length })
  t.match(await refusal(`{"a":${'['.repeat(300)}${']'.repeat(300)}}`), { code: 'invalid_json', offset: 5 + 255 })
  t.match(await refusal(`{"a":${'1'.repeat(5000)}}`), { code: 'invalid_json' })
})

t.test('agrees with JSON.parse on what JSON is, for texts with one byte changed', async t => {
  const random = new Random(7)
  let refused = 0
  for (let i = 0; i < (FULL ? 20_000 : 2000); i++) {
    const value = { model: 'm', x: randomJson(random, 3), messages: [{ role: 'user', content: [picture('data:image/png;base64,AAAA')] }] }
    const bytes = Buffer.from(random.spaced(value))
    const at = random.below(bytes.length)
    if (random.below(2) === 0) bytes[at] = random.pick(Buffer.from('{}[]",:\\ue1-+.0 \nftn\x01'))
    const text = bytes.toString()
    if (text.includes('\ufffd')) continue
    let valid = true
    try { JSON.parse(text) } catch { valid = false }
    const error = await parseBody(bytes).then(() => undefined, refusedBy)
    const ok = error === undefined || error.code !== 'invalid_json'
    if (ok !== valid) t.fail(`${valid ? 'refused' : 'took'} ${text}: ${error?.message ?? ''}`)
    if (!ok) refused++
  }
  t.ok(refused > 100, `${refused} texts were refused`)
})

t.test('finds a control character wherever it stands in a long string, and takes every other byte', async t => {
  const random = new Random(11)
  const head = '{"model":"m","x":"'
  for (const length of [0, 1, 63, 64, 65, 300, 16_383, 16_384, 16_385, 40_000, 1_100_000]) {
    // Every text that JSON lets stand as it is, of one to four bytes a character.
    const fine = Buffer.from(Array.from({ length: 400 }, () => random.pick([' ', '\x7f', 'A', '~', '\u0080', '\u009f', '\u07ff', '\u20ac', '\u{1f600}', '\u{10ffff}'])).join(''))
    const text = Buffer.concat([Buffer.from(head), Buffer.alloc(length, 'A'), fine, Buffer.from('"}')])
    await parseBody(text)
    const places = [head.length, head.length + length, ...Array.from({ length: 20 }, () => head.length + random.below(length + 1))]
    for (const at of places) {
      // In front of a character, not within one.
      const bad = Buffer.concat([text.subarray(0, at), Buffer.from([random.below(0x20)]), text.subarray(at)])
      const error = await parseBody(bad).then(() => undefined, refusedBy)
      if (error?.code !== 'invalid_json' || error.offset !== at) t.fail(`byte ${at} of ${bad.length} was ${error === undefined ? 'taken' : error.message}`)
    }
  }
  t.pass('all were found')
})

t.test('refuses bytes that are not UTF-8, at the right offset', async t => {
  const good = Buffer.from('{"model":"m","x":"\u00e4\u20ac\u{1f600}' + 'y'.repeat(5_000_000) + '"}')
  await parseBody(good)
  for (const [offset, byte] of [[19, 0x20], [18, 0xff], [30, 0x80], [4_999_000, 0xc3], [good.length - 2, 0xf0]] as const) {
    const bad = Buffer.from(good)
    bad[offset] = byte
    const error = await parseBody(bad).then(() => undefined, refusedBy)
    t.match(error, { statusCode: 400, code: 'invalid_utf8' }, `byte ${offset}`)
    t.ok(Math.abs(error!.offset - offset) <= 1, `${error!.offset} is at ${offset}`)
  }
})

t.test('refuses a member that is there twice, in any spelling', async t => {
  for (const [text, param] of [
    ['{"model":"a","model":"b"}', 'model'],
    ['{"model":"a","mod\\u0065l":"b"}', 'model'],
    ['{"model":"a","with_cache":1,"with_\\u0063ache":2}', 'with_cache'],
    ['{"model":"a","x":1,"x":2}', 'x'],
    ['{"model":"a","messages":[],"messages":[{}]}', 'messages'],
    ['{"model":"a","messages":[{"role":"user","content":"","content":[]}]}', 'messages[0].content'],
    ['{"model":"a","messages":[{"role":"user"},{"content":[],"cont\\u0065nt":[]}]}', 'messages[1].content'],
    ['{"model":"a","messages":[{"content":[{"type":"text","type":"image_url"}]}]}', 'messages[0].content[0].type'],
    ['{"model":"a","messages":[{"content":[1,{"image_url":"a","image_url":"b"}]}]}', 'messages[0].content[1].image_url'],
    ['{"model":"a","messages":[{"content":[{"image_url":{"url":"a","url":"b"}}]}]}', 'messages[0].content[0].url']
  ] as const) t.match(await refusal(text), { code: 'duplicate_member', param })
  const many = Array.from({ length: 100 }, (_, i) => `"m${i}":${i}`)
  t.equal((await parseBodyValue(`{"model":"a",${many.join()}}`)).scalar('m99'), 99)
  for (const i of [0, 30, 31, 32, 99]) t.match(await refusal(`{"model":"a",${many.join()},"\\u006d${i}":1}`), { code: 'duplicate_member', param: `m${i}` })
  t.match(await refusal(`{"model":"a",${Array.from({ length: 5000 }, (_, i) => `"m${i}":1`).join()}}`), { code: 'invalid_value' })
  const long = 'L'.repeat(600)
  const odd = await parseBodyValue(`{"${long}":1,"model":"a","with_cache":1,"${long}":2}`)
  t.equal(Buffer.concat(odd.splice({})).toString(), `{"${long}":1,"model":"a","${long}":2}`, 'names that are not read pass')
  t.ok(await parseBodyValue('{"model":"a","tools":[{"x":1,"x":2}]}'), 'members that are not read may repeat themselves')
})

t.test('control fields never go upstream, however they are spelled', async t => {
  for (const name of CONTROL_FIELDS) {
    const escaped = [...name].map((c, i) => i % 2 === 0 ? c : `\\u00${c.charCodeAt(0).toString(16)}`).join('')
    for (const spelled of [name, escaped]) {
      const member = `"${spelled}": {"a":[1,"}"]}`
      for (const text of [`{${member},"model":"m"}`, `{"model":"m" , ${member}}`, `{"model":"m",${member} ,"x":1}`, `{ ${member}, "model":"m", "with_cache":true, "a":2 }`]) {
        if (name === 'with_cache' && text.includes('"with_cache":true')) continue
        const body = await parseBodyValue(text)
        t.ok(body.stripped.includes(name))
        t.notOk(body.has(name))
        const expected = JSON.parse(text) as Record<string, unknown>
        for (const field of CONTROL_FIELDS) delete expected[field]
        t.strictSame(joined(body.splice({})), expected)
        t.strictSame(joined(body.splice({ set: { [name]: '[7]', y: '"z"' } })), { ...expected, [name]: [7], y: 'z' })
        t.equal(Buffer.concat(body.splice({ set: { [name]: '[7]' } })).toString().split(name).length, 2)
        t.strictSame(joined(body.pick([])), { model: 'm', messages: [] })
      }
    }
  }
  t.match(await refusal({ model: 'm', vllm_xargs: { a: { kv_transfer_params: 1 }, kv_transfer_params: {} } }), { param: 'vllm_xargs.kv_transfer_params' })
  t.ok(await parseBodyValue({ model: 'm', vllm_xargs: { a: { kv_transfer_params: 1 } }, messages: [{ encoder_result: 1 }] }))
})

t.test('finds media parts of every kind and nothing else', async t => {
  const body = await parseBodyValue({
    vllm_xargs: [[1], 2],
    messages: [
      { role: 'assistant', content: [picture('http://a/1')] },
      'odd',
      { content: ['odd', { type: 'text', text: 'data:image/png;base64,AA' }, picture('http://a/2'), [picture('http://a/no')], { type: 'image_url', image_url: 'http://a/3', detail: {} }], role: 'user' },
      { role: 'user', content: 'text' },
      { role: 'tool', content: [{ type: 'image', image: 'u4' }, { type: 'image_data', image_data: { data: 'u5', max_dynamic_patch: 2 } }, { type: 'video_url', video_url: { url: 'u6' } }] },
      { role: 'system', content: [{ type: 'video', video: 'u7' }, { type: 'audio_url', audio_url: { url: 'u8' } }, { type: 'audio', audio: 'u9' }] },
      { role: 'user', content: [{ type: 'input_audio', input_audio: { data: 'u10', format: 'wav' } }, { image_url: { url: 'u11' } }, { image_url: { data: 'x', url: 'u12' }, type: 'image_url' }] },
      { role: 'user', content: [{ type: 'image_url', image_url: null, uuid: 'x' }, { type: 'novel', novel: { url: 'u' } }, { type: 'text', image_url: { url: 'u' } }, { type: 'image_url', image_url: { url: ['u'] } }, { type: 3, image_url: 'u' }, { type: 'image_embeds', image_embeds: 'AAAA' }] },
      { role: 'user', tool_calls: [{ type: 'image_url', image_url: 'u' }], content: { type: 'image_url', image_url: 'u' } }
    ],
    model: 'm',
    deep: { messages: [{ role: 'user', content: [picture('u')] }] }
  })
  const url = (i: number): string => { const { start, end } = body.media[i]!.url; return body.bytes.toString('utf8', start, end) }
  t.strictSame(body.media.map((m, i) => [m.index, m.message, m.part, m.modality, m.type, url(i)]), [
    [0, 0, 0, 'image', 'image_url', 'http://a/1'], [1, 2, 2, 'image', 'image_url', 'http://a/2'], [2, 2, 4, 'image', 'image_url', 'http://a/3'],
    [3, 4, 0, 'image', 'image', 'u4'], [4, 4, 1, 'image', 'image_data', 'u5'], [5, 4, 2, 'video', 'video_url', 'u6'],
    [6, 5, 0, 'video', 'video', 'u7'], [7, 5, 1, 'audio', 'audio_url', 'u8'], [8, 5, 2, 'audio', 'audio', 'u9'],
    [9, 6, 0, 'audio', 'input_audio', 'u10'], [10, 6, 1, 'image', 'image_url', 'u11'], [11, 6, 2, 'image', 'image_url', 'u12'],
    [12, 7, 0, 'image', 'image_url', ''], [13, 7, 3, 'image', 'image_url', ''], [14, 7, 5, 'image', 'image_embeds', ''], [15, 8, 0, 'image', 'image_url', 'u']
  ])
  for (const item of body.media) {
    const part = JSON.parse(body.bytes.toString('utf8', item.span.start, item.span.end)) as object
    const { content } = (JSON.parse(body.bytes.toString()) as { messages: Array<{ content: object[] | object }> }).messages[item.message]!
    t.strictSame(part, Array.isArray(content) ? content[item.part] : content)
    t.equal(item.routeKey, fingerprint(Buffer.from(item.unencodable === undefined ? url(item.index) : JSON.stringify(part))))
  }
  t.equal((await parseBodyValue(chat(...Array.from({ length: 512 }, (_, i) => picture(`u${i}`))))).media.length, 512)
  t.match(await refusal(chat(...Array.from({ length: 513 }, (_, i) => picture(`u${i}`)))), { code: 'too_many_media', param: 'messages' })
})

t.test('reads types, roles and URLs through escapes', async t => {
  const text = '{"model":"m","messages":[{"r\\u006fle":"us\\u0065r","c\\u006fntent":[{"typ\\u0065":"image\\u005furl","image_\\u0075rl":{"u\\u0072l":"http:\\/\\/a\\/\\u00e4\\"x"}}]}]}'
  const body = await parseBodyValue(text)
  t.equal(body.media.length, 1)
  const { start, end } = body.media[0]!.url
  t.equal(text.slice(start, end), 'http:\\/\\/a\\/\\u00e4\\"x')
  t.match(joined(body.splice({ mediaUrls: ['epd:"q"\\\u00fc'] })), { messages: [{ content: [{ image_url: { url: 'epd:"q"\\\u00fc' } }] }] })
})

t.test('refuses epd: URLs in any disguise, naming the part', async t => {
  const param = 'messages[0].content[1]'
  const text = { type: 'text', text: 'epd:b7c1 is fine here' }
  for (const url of ['epd:b7', 'EPD:b7', 'Epd:', '  epd:b7', '\tepd:b7', 'e\npd:x', '\u00a0epd:1', '\ufeffepd:1', '\u0000epd:1', 'ep\u200bd:1']) {
    for (const part of [picture(url), { type: 'image_url', image_url: url }, { type: 'image', image: url }, { type: 'image_data', image_data: { data: url } },
      { image_url: { url } }, { type: 'text', text: '', image_url: { url } }, { type: 'image_url', image_url: { url: 'http://x', data: url } },
      { type: 'input_audio', input_audio: { data: url } }]) {
      t.match(await refusal(chat(text, part)), { statusCode: 400, code: 'invalid_media', param }, JSON.stringify(part))
    }
  }
  for (const spelled of ['\\u0065pd:1', 'epd\\u003a1', '\\u0045\\u0050\\u0044\\u003A', '\\n\\tepd:1']) {
    t.match(await refusal(`{"model":"m","messages":[{"content":[1,{"image_url":{"url":"${spelled}"},"type":"image_url"}],"role":"assistant"}]}`), { code: 'invalid_media', param })
  }
  for (const url of ['http://epd:1', 'ep', 'epd', 'data:epd:', 'epdx:1', '']) t.ok(await parseBodyValue(chat(text, picture(url))))
})

t.test('edits make the same JSON as the same edits on the parsed value', async t => {
  const random = new Random(42)
  for (let i = 0; i < (FULL ? 10_000 : 1000); i++) {
    const value = randomRequest(random)
    const body = await parseBodyValue(random.spaced(value))
    const expected = structuredClone(value) as Record<string, unknown> & { messages: Array<{ content: Array<Record<string, unknown>> }> }
    for (const name of CONTROL_FIELDS) delete expected[name]
    const names = Object.keys(value).filter(() => random.below(4) === 0).filter(name => name !== 'messages' || random.below(4) === 0)
    const set: Record<string, string> = {}
    const remove: string[] = []
    const mediaUrls = body.media.map(() => random.below(2) === 0 ? `epd:${random.below(99)}"` : undefined)
    body.media.forEach((item, i) => {
      if (mediaUrls[i] === undefined) return
      const part = expected.messages[item.message]!.content[item.part]!
      if (typeof part[item.type] === 'string') part[item.type] = mediaUrls[i]
      else (part[item.type] as { url: string }).url = mediaUrls[i]
    })
    for (const name of [...names, 'n\u00e9w', 'encoder_result']) {
      if (random.below(2) === 0 && name !== 'encoder_result') {
        remove.push(name)
        Reflect.deleteProperty(expected, name)
      } else {
        const json = randomJson(random, 2)
        set[name] = JSON.stringify(json)
        expected[name] = json
      }
    }
    const chunks = body.splice({ set, remove, mediaUrls })
    t.ok(chunks.every(chunk => chunk.length > 0))
    const text = Buffer.concat(chunks).toString()
    if (!deepEqual(JSON.parse(text), expected)) t.strictSame(JSON.parse(text), expected, text)
  }
})

t.test('picks media parts into a request for an encoder', async t => {
  const body = await parseBodyValue({
    messages: [{ role: 'user', content: [{ type: 'text', text: 'a' }, picture('u1'), picture('u2')] }, { role: 'tool', content: [picture('u3')] }],
    model: 'm"',
    mm_processor_kwargs: { image: { max_pixels: 9 } },
    media_io_kwargs: null,
    encoder_result: [],
    stream: true
  })
  const common = { model: 'm"', mm_processor_kwargs: { image: { max_pixels: 9 } }, media_io_kwargs: null }
  const user = (...content: unknown[]): unknown => ({ role: 'user', content })
  t.strictSame(joined(body.pick(body.media)), { ...common, messages: [user(picture('u1'), picture('u2')), user(picture('u3'))] })
  t.strictSame(joined(body.pick([body.media[1]!], { epd_tenant: '"t"', model: '"other"' })), { ...common, model: 'other', epd_tenant: 't', messages: [user(picture('u2'))] })
  t.strictSame(joined(body.pick([body.media[2]!, body.media[0]!])), { ...common, messages: [user(picture('u3')), user(picture('u1'))] })
})

t.test('big spans are not copied', async t => {
  const url = 'data:image/png;base64,' + 'A'.repeat(1 << 20)
  const body: Body = await parseBodyValue(chat(picture(url), picture('http://a'), picture(url)))
  const shares = (chunks: Buffer[]): number => chunks.filter(chunk => chunk.buffer === body.bytes.buffer).reduce((sum, chunk) => sum + chunk.length, 0)
  t.ok(shares(body.splice({ set: { stream: 'true' } })) > 2 << 20)
  t.ok(shares(body.pick([body.media[2]!])) > 1 << 20)
  t.ok(body.splice({ mediaUrls: [undefined, 'epd:1'] }).length <= 4, 'small slices are put together')
  t.equal(body.splice({ mediaUrls: ['epd:1', 'epd:2', 'epd:3'] }).length, 1, 'a small body is one buffer')
  t.ok(body.textBytes < 400)
})

function randomRequest (random: Random): Record<string, unknown> {
  const content = (): unknown[] => Array.from({ length: random.below(4) }, () => random.pick([
    () => ({ type: 'text', text: random.string() }),
    () => ({ type: 'image_url', image_url: { url: 'http://x/' + random.string(), detail: 'low' } }),
    () => ({ image: 'data:,' + random.string(), type: 'image', extra: randomJson(random, 2) })
  ])())
  const members: Array<[string, unknown]> = [
    ['model', 'm'], ['messages', Array.from({ length: random.below(4) }, () => ({ role: random.pick(['user', 'assistant', 'tool']), content: content() }))],
    ['stream', random.below(2) === 0], ['x', randomJson(random, 3)], ['y "\u00e9"', randomJson(random, 2)]
  ]
  for (const name of CONTROL_FIELDS) if (random.below(4) === 0) members.push([name, randomJson(random, 2)])
  return Object.fromEntries(random.shuffle(members))
}

function deepEqual (a: unknown, b: unknown): boolean {
  if (a === b) return true
  if (typeof a !== 'object' || typeof b !== 'object' || a === null || b === null || Array.isArray(a) !== Array.isArray(b)) return false
  const keys = Object.keys(a)
  return keys.length === Object.keys(b).length &&
    keys.every(key => Object.hasOwn(b, key) && deepEqual((a as Record<string, unknown>)[key], (b as Record<string, unknown>)[key]))
}
