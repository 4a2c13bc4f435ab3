import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import t from 'tap'
import { packageRoot } from '../helper/package-root.ts'
import { OptionsError, optionsSchema, resolveOptions } from '../../plugin/options/index.ts'
import { ENGINE_ERROR_STATUS } from '../../engines/service/errors.ts'
import { clientError, ERRORS, epdError, toEpdError, toReply } from '../../plugin/errors.ts'
import { AdapterError } from '../../adapters/adapter.ts'
import { errorTypeOf } from '../../adapters/wire/openai-error.ts'
import { fakeAdapter } from '../helper/fake-node.ts'

function problems (raw: unknown): Array<{ instancePath: string, message: string }> {
  try {
    resolveOptions(raw)
    return []
  } catch (err) {
    if (err instanceof OptionsError) return [...err.problems]
    throw err
  }
}

t.test('without options the defaults apply', async t => {
  const options = resolveOptions({})
  t.match(options, {
    embedded: { encoders: 1, engines: 1, backend: 'pytorch' },
    nodes: [],
    bypass: 'never',
    retries: 2,
    limits: { body: 64 * 1024 * 1024, items: 64 },
    routing: { disaggregate: 'auto', disaggregateTokens: 1_024 },
    timeouts: { encode: 30_000, grace: 10_000 },
    routes: { openai: true, nodes: true, sglang: true, vllm: true, health: true, metrics: true, traces: true },
    headers: true,
    traces: 1_000,
    prefix: ''
  })
})

t.test('nodes turn the embedded engines off, and with them bypass "never"', async t => {
  const options = resolveOptions({ nodes: [{ url: 'http://a:1' }] })
  t.equal(options.embedded, undefined)
  t.equal(options.bypass, 'auto')
  t.same(resolveOptions({ nodes: [{ url: 'http://a:1' }], embedded: { encoders: 2 } }).embedded, { encoders: 2, engines: 1, prefill: 0, decode: 0, backend: 'pytorch' })
  t.equal(resolveOptions({ embedded: false }).embedded, undefined)
})

t.test('embedded prefill and decode engines take the place of those that do both, and go together', async t => {
  t.same(resolveOptions({ embedded: { prefill: 1, decode: 2 } }).embedded, { encoders: 1, engines: 0, prefill: 1, decode: 2, backend: 'pytorch' })
  t.match(resolveOptions({ embedded: { prefill: 1, decode: 1, engines: 1 } }).embedded, { engines: 1 })
  t.same(problems({ embedded: { prefill: 1 } }), [{ instancePath: '/embedded/decode', message: 'embedded.decode must be >= 1 beside embedded.prefill, not 0' }])
  t.same(problems({ embedded: { decode: 1, engines: 1 } }), [{ instancePath: '/embedded/prefill', message: 'embedded.prefill must be >= 1 beside embedded.decode, not 0' }])
  t.same(problems({ embedded: { engines: 0 } }), [{ instancePath: '/embedded/engines', message: 'embedded.engines must be >= 1 without embedded.prefill and embedded.decode, not 0' }])
})

t.test('attached routes leave out what the application has itself', async t => {
  t.match(resolveOptions({ attach: ['/v1/chat/completions'] }).routes, { openai: false, health: false, metrics: false, nodes: true })
  t.match(resolveOptions({ routes: false }).routes, { openai: false, nodes: true, traces: true })
  t.match(resolveOptions({ routes: { nodes: false } }).routes, { openai: true, nodes: false })
})

t.test('messages name path, bound and value', async t => {
  const rows: Array<[unknown, string, string]> = [
    [{ timeouts: { encode: 0 } }, '/timeouts/encode', 'timeouts.encode must be >= 1, not 0'],
    [{ timeouts: { encode: '5s' } }, '/timeouts/encode', 'timeouts.encode must be an integer, not "5s"'],
    [{ timeout: 5 }, '/timeout', 'unknown option timeout (known here: $schema, embedded, '],
    [{ limits: { bodies: 5 } }, '/limits/bodies', 'unknown option limits.bodies (known here: body, gzip, zstd, items)'],
    [{ bypass: 'always' }, '/bypass', 'bypass must be one of "auto", "never", not "always"'],
    [{ routing: { disaggregate: 'sometimes' } }, '/routing/disaggregate', 'routing.disaggregate must be one of "auto", "always", "never", not "sometimes"'],
    [{ routing: { policy: 'random' } }, '/routing/policy', 'routing.policy must be one of "prefix", "least-tokens", "session" or, in code, a function, not "random"'],
    [{ retries: 6 }, '/retries', 'retries must be <= 5, not 6'],
    [{ nodes: [{ role: 'hybrid' }] }, '/nodes/0', 'nodes[0].url is missing'],
    [{ nodes: [{ url: 'a:1' }] }, '/nodes/0/url', 'nodes[0].url must be an http:// or https:// URL, not "a:1"'],
    [{ nodes: [{ url: 'http://a:1', role: 'vision' }] }, '/nodes/0/role', 'nodes[0].role must be one of "encoder", "prefill", "decode", "hybrid", not "vision"'],
    [{ embedded: 'yes' }, '/embedded', 'embedded must be true, false or an object with encoders, engines, prefill, decode, backend, model, not "yes"'],
    [{ embedded: { encoders: 99 } }, '/embedded/encoders', 'embedded.encoders must be <= 16, not 99'],
    [{ embedded: { encoder: 1 } }, '/embedded/encoder', 'unknown option embedded.encoder (known here: encoders, engines, prefill, decode, backend, model)'],
    [{ tenant: 5 }, '/tenant', "tenant must be a request header's name or, in code, a function, not 5"],
    [{ allowedNetworks: ['intranet'] }, '/allowedNetworks/0', 'allowedNetworks[0] must be an IP address or a network such as 10.0.0.0/8, not "intranet"'],
    ...['ai', '/:id', '/a b', '/*', '//'].map((prefix): [object, string, string] => [{ prefix }, '/prefix', `prefix must be empty or a path that begins with /, of letters, digits and - _ . ~ @, not ${JSON.stringify(prefix)}`]),
    ...['10.0.0.0/33', '::/129', '1.2', '::1::/8'].map((network): [object, string, string] => [{ allowedNetworks: [network] }, '/allowedNetworks/0', `allowedNetworks[0] must be an IP address or a network such as 10.0.0.0/8, not "${network}"`]),
    ...['..', 'a b', 'a..b', 'http://a'].map((dns): [object, string, string] => [{ discover: [{ dns }] }, '/discover/0/dns', `discover[0].dns must be a name such as encoder.vlm.svc, not "${dns}"`]),
    ...['a\nb', '\u20ac'].flatMap((key): Array<[object, string, string]> => [
      [{ nodes: [{ url: 'http://h', apiKey: key }] }, '/nodes/0/apiKey', `nodes[0].apiKey must be text that a header can have, not ${JSON.stringify(key)}`],
      [{ apiKeys: [key] }, '/apiKeys/0', `apiKeys[0] must be text that a header can have, not ${JSON.stringify(key)}`],
      [{ adminKey: key }, '/adminKey', `adminKey must be text that a header can have, not ${JSON.stringify(key)}`]
    ]),
    [{ tenant: 'x y' }, '/tenant', "tenant must be a request header's name or, in code, a function, not \"x y\""],
    [{ adapters: [{}] }, '/adapters/0', ''],
    [[], '', 'options must be an object, not []']
  ]
  for (const [raw, instancePath, message] of rows) {
    const found = problems(raw)
    t.equal(found[0]?.instancePath, instancePath, JSON.stringify(raw))
    t.ok(found[0]?.message.startsWith(message), `${found[0]?.message}`)
  }
  t.equal(problems({ bypass: 1, retries: -1, what: 1 }).length, 3, 'every problem is reported')
  t.throws(() => resolveOptions({ retries: 9 }), { code: 'EPD_ERR_OPTIONS', message: 'Invalid options: retries must be <= 5, not 9' })
})

t.test('the options given are not touched, and adapters and functions are taken as they are', async t => {
  const tenant = (): string => 'x'
  const policy = (): never[] => []
  const raw = Object.freeze({ embedded: false, routing: { policy }, timeouts: Object.freeze({ encode: 5 }), adapters: Object.freeze([fakeAdapter]), tenant, logLevel: undefined, $schema: 'x' })
  const options = resolveOptions(raw)
  t.equal(options.adapters[0], fakeAdapter)
  t.equal(options.tenant, tenant)
  t.equal(options.routing.policy, policy)
  t.equal(options.timeouts.encode, 5)
  t.equal(options.timeouts.link, 10_000)
  t.same(raw.timeouts, { encode: 5 })
  t.notOk('$schema' in options)
})

t.test('every error of the table has a status, a type and a code, and can be distinguished from others', async t => {
  for (const [code, row] of Object.entries(ERRORS)) {
    const error = epdError(code as keyof typeof ERRORS, ['a', 'b'])
    t.equal(error.code, code)
    t.equal(error.statusCode, row.statusCode)
    const reply = toReply(error)
    t.equal(reply.headers['retry-after'] !== undefined, 'again' in row && row.again, code)
    t.match(JSON.parse(reply.body as string), { error: { type: errorTypeOf(row.statusCode), code: row.code, param: null } })
  }
})

t.test('whatever is thrown becomes an error of the table', async t => {
  const node = 'http://10.0.0.1:1'
  const rows: Array<[unknown, string]> = [
    [new AdapterError('UNAVAILABLE', 'x', { node }), 'EPD_ERR_UPSTREAM_FAILED'],
    [new AdapterError('UNAVAILABLE', 'x', { node, how: 'late' }), 'EPD_ERR_UPSTREAM_TIMEOUT'],
    [new AdapterError('BUSY', 'x', { node, retryAfter: 4 }), 'EPD_ERR_UPSTREAM_BUSY'],
    [new AdapterError('FEATURES_GONE', 'x', { node }), 'EPD_ERR_FEATURES_GONE'],
    [new AdapterError('KV_GONE', 'x', { node }), 'EPD_ERR_KV_GONE'],
    [new AdapterError('REFUSED', 'x', { node }), 'EPD_ERR_LINK_REFUSED'],
    [new AdapterError('REJECTED', 'x', { node }), 'EPD_ERR_UPSTREAM_FAILED'],
    [epdError('EPD_ERR_INVALID_JSON', ['at byte 3']), 'EPD_ERR_INVALID_JSON'],
    [Object.assign(new Error('x'), { statusCode: 415 }), 'EPD_ERR_MEDIA_TYPE'],
    [Object.assign(new Error('no body'), { statusCode: 400, code: 'FST_ERR_CTP_EMPTY_JSON_BODY' }), 'EPD_ERR_INVALID_BODY'],
    [new TypeError('bug'), 'EPD_ERR_INTERNAL'],
    ['a string', 'EPD_ERR_INTERNAL'],
    [null, 'EPD_ERR_INTERNAL']
  ]
  for (const [thrown, code] of rows) {
    t.equal(toEpdError(thrown).code, code)
    t.notMatch(clientError(thrown).message, /10\.0\.0\.1|bug/, 'nothing internal is revealed')
  }
  t.equal(toReply(rows[2]![0]).headers['retry-after'], '4')
  t.match(clientError(epdError('EPD_ERR_INVALID_MEDIA', ['no'], { param: 'messages[0].content[1]' })), { code: 'invalid_media', param: 'messages[0].content[1]' })
})

t.test('every option and every error is documented, with its default and its codes', async t => {
  const options = await readFile(join(packageRoot(), 'docs', 'options.md'), 'utf8')
  for (const [name, schema] of Object.entries(optionsSchema.properties)) {
    if (name === '$schema') continue
    t.ok(options.includes(`### \`${name}\``), name)
    for (const [member, { default: value }] of Object.entries((schema as { properties?: Record<string, { default?: unknown }> }).properties ?? {})) {
      const row = options.split('\n').find(line => line.startsWith(`| \`${member}\` |`))
      t.ok(row, `${name}.${member}`)
      if (typeof value === 'number') t.ok(row?.includes(`\`${value}\``), `${name}.${member}: default ${value}`)
    }
  }
  const errors = await readFile(join(packageRoot(), 'docs', 'errors.md'), 'utf8')
  for (const [code, { code: clientCode, statusCode }] of Object.entries(ERRORS)) {
    const row = errors.split('\n').find(line => line.startsWith(`| \`${code}\` |`))
    t.ok(row?.includes(`\`${clientCode}\``) && row.includes(`| ${statusCode}`), code)
  }
  for (const [code, status] of Object.entries(ENGINE_ERROR_STATUS)) {
    t.ok(errors.split('\n').some(line => /^\| `[a-z]/.test(line) && line.split('|')[1]!.includes(`\`${code}\``) && line.includes(`| ${status}`)), `${code} of engines`)
  }
})
