/** Real engines, started by hand as a user would, register with a gateway that has none of its own. */
import t, { type Test } from 'tap'
import { drawScene } from '../helper/scenes.ts'
import { startCli, type CliServer } from '../helper/cli.ts'
import { until } from '../helper/until.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const QUESTIONS = FULL ? 100 : 3
/** At least; and so many that several encoders share them. */
const PICTURES = FULL ? 24 : 4
const AT_ONCE = FULL ? 24 : 4
const ENCODERS = FULL ? 4 : 2

interface NodeStatus { readonly role: number, readonly health: string, readonly links?: Record<string, { state: string }> }

const config = t.testdir({ 'epd.config.json': JSON.stringify({ embedded: false, bypass: 'never' }) })
const gateway = await startCli(t, ['serve', '--config', `${config}/epd.config.json`, '--port', '0', '--log-level', 'warn'])
/** Engines that live as long as the file. */
const whole = t
const encoders: CliServer[] = []
const hybrid = await engine(whole, 'hybrid')

async function engine (t: Test, role: 'encoder' | 'hybrid'): Promise<CliServer> {
  return await startCli(t, ['engine', '--role', role, '--port', '0', '--proxy-url', gateway.url, '--sharing', '2', '--log-level', 'warn'])
}

async function status (): Promise<Record<string, NodeStatus>> {
  return await (await fetch(`${gateway.url}/nodes/status`)).json() as Record<string, NodeStatus>
}

async function linked (url: string): Promise<void> {
  await until(async () => {
    const nodes = await status()
    return nodes[url]?.health === 'healthy' && nodes[url]?.links?.[hybrid.url]?.state === 'linked'
  }, `${url} is healthy and linked`)
}

interface Answer { readonly status: number, readonly headers: Headers, readonly text: string }

async function ask (base: string, question: string, ...urls: string[]): Promise<Answer> {
  const response = await fetch(`${base}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({
      model: 'tiny-internvl',
      temperature: 0,
      messages: [{ role: 'user', content: [...urls.map(url => ({ type: 'image_url', image_url: { url } })), { type: 'text', text: question }] }]
    })
  })
  const json = await response.json() as { choices?: Array<{ message: { content: string } }> }
  return { status: response.status, headers: response.headers, text: json.choices?.[0]?.message.content ?? JSON.stringify(json) }
}

await t.test('without an encoder the language model engine encodes by itself, and the plan says so', async t => {
  await until(async () => (await status())[hybrid.url]?.health === 'healthy', 'the engine is healthy')
  const answer = await ask(gateway.url, 'How many shapes are there?', await drawScene(1))
  t.equal(answer.status, 200, answer.text)
  t.equal(answer.headers.get('x-epd-plan'), 'hybrid')
})

await t.test('what is too long for the engine is refused before it gets there, as the engine itself would', async t => {
  const { data: [card] } = await (await fetch(`${gateway.url}/v1/models`)).json() as { data: [{ max_model_len: number, epd: { max_messages: number, max_characters: number } }] }
  const { max_model_len: tokens, epd: { max_messages: most, max_characters: characters } } = card
  t.ok(tokens > 0 && most >= tokens && characters > tokens)
  for (const messages of [Array.from({ length: most + 1 }, () => ({ role: 'user', content: 'a' })), [{ role: 'user', content: 'a'.repeat(3 * characters + 3) }]]) {
    const seen = await Promise.all([gateway.url, hybrid.url].map(async base => {
      const response = await fetch(`${base}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ model: 'tiny-internvl', messages }) })
      const { error } = await response.json() as { error: { code: string, param: string, type: string } }
      return { status: response.status, code: error.code, param: error.param, type: error.type, plan: response.headers.get('x-epd-plan') }
    }))
    const refusal = { status: 400, code: 'context_length_exceeded', param: 'messages', type: 'invalid_request_error', plan: null }
    t.same(seen, [refusal, refusal])
  }
})

await t.test(`with 1 to ${ENCODERS} encoders a picture always meets the same one`, async t => {
  const encoderOf = async (url: string): Promise<string> => {
    const { headers } = await ask(gateway.url, 'How many shapes are there?', url)
    t.equal(headers.get('x-epd-plan'), 'e-pd')
    return headers.get('x-epd-encoders')!
  }
  for (let n = 1; n <= ENCODERS; n++) {
    encoders.push(await engine(whole, 'encoder'))
    await linked(encoders.at(-1)!.url)
    const met = new Map<string, string>()
    // One after the other: where many come at once, some go to another encoder so that none has too many.
    const used = (): number => new Set(met.values()).size
    for (let seed = 100; seed < 200 && (met.size < PICTURES || used() < Math.min(n, 2)); seed++) {
      const url = await drawScene(seed)
      met.set(url, await encoderOf(url))
    }
    t.ok(used() >= Math.min(n, 2), 'several encoders share the pictures')
    for (const [url, encoder] of met) t.equal(await encoderOf(url), encoder, `${n} encoders: the same picture went to the same encoder`)
  }
})

await t.test('answers through the gateway equal the engine\'s own', async t => {
  const questions = ['Describe the picture.', 'How many shapes are there?', 'Is there a red circle?']
  for (let i = 0; i < QUESTIONS; i++) {
    const urls = await Promise.all(Array.from({ length: 1 + i % 4 }, (_, j) => drawScene(1000 + i * 4 + j)))
    const question = questions[i % questions.length]!
    const [routed, own] = [await ask(gateway.url, question, ...urls), await ask(hybrid.url, question, ...urls)]
    t.equal(routed.text, own.text, `${question} (${urls.length} pictures)`)
    t.equal(routed.headers.get('x-epd-encoders')?.split(',').length, urls.length, 'each picture has its encoder named')
  }
})

await t.test('an encoder that was killed is replaced by the next one', async t => {
  const doomed = encoders[0]!
  await doomed.stop('SIGKILL')
  const answers = await Promise.all(Array.from({ length: AT_ONCE }, async (_, i) => await ask(gateway.url, 'How many shapes are there?', await drawScene(2000 + i))))
  t.ok(answers.every(answer => answer.status === 200), 'every question was answered')
  t.notOk(answers.some(answer => answer.headers.get('x-epd-encoders')?.includes(doomed.url)), 'none by the dead encoder')
})

await t.test('text-only questions go straight to the language model', async t => {
  const answer = await ask(gateway.url, 'Hello')
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-plan'), 'pd')
  t.equal(answer.headers.get('x-epd-encoders'), null)
})
