/** Bodies that real clients send, recorded offline into test/fixtures/clients.json: gateway and engines read the same pictures in them. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { collectMedia } from '../../engines/encoder/media-parts.ts'
import { readMessages } from '../../engines/llm/api/input.ts'
import { refuseUnsupported } from '../../engines/llm/api/unsupported.ts'
import { parseBody } from '../../plugin/body/index.ts'
import type { Json } from '../../adapters/wire/json.ts'
import { partsOf } from '../../adapters/wire/media.ts'
import { PNG } from '../helper/media-spellings.ts'
import { packageRoot } from '../helper/package-root.ts'

/** `<PNG>` stands for a picture in base64. A picture within a text (LangChain writes the output of a tool so in responses) is text to every server. */
interface Recorded { readonly client: string, readonly path: string, readonly body: Json }

const text = readFileSync(join(packageRoot(), 'test/fixtures/clients.json'), 'utf8')
const recorded = JSON.parse(text.replaceAll('<PNG>', PNG)) as readonly Recorded[]

t.test('gateway and engines find every picture of every client', async t => {
  for (const { client, path, body } of recorded) {
    const json = JSON.stringify(body)
    const pictures = json.split(PNG).length - 1 - (json.split('\\"url\\"').length - 1)
    const { media } = await parseBody(Buffer.from(json))
    // Our engines do not rank.
    const inMessages = path !== '/v1/rerank'
    t.same(media.map(item => item.path), inMessages ? collectMedia(body).map(item => item.param) : [...partsOf(body)].filter(({ type }) => type !== undefined).map(part => part.path), client)
    t.equal(media.length, pictures, `${client}: ${pictures} pictures`)
    t.ok(media.every(item => item.size?.width === 1 && !item.remote && (item.unencodable === undefined) === inMessages))
  }
})

t.test('engines take the chats', async t => {
  for (const { client, path, body } of recorded) {
    const { messages } = body as { messages?: ReadonlyArray<{ role: string }> }
    if (path !== '/v1/chat/completions' || messages!.some(({ role }) => role === 'tool')) continue
    refuseUnsupported(body)
    const parts = readMessages(body).flatMap(({ content }) => typeof content === 'string' ? [] : content)
    t.equal(parts.filter(({ type }) => type === 'image').length, collectMedia(body).length, client)
  }
})
