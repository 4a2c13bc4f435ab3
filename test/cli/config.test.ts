/* eslint no-template-curly-in-string: off -- ${NAME} is what the files hold. */
/** Configuration files, through `fastify-epd serve --check` and the servers that start with them. */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, renameSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect, type DetailedPeerCertificate } from 'node:tls'
import t, { type Test } from 'tap'
import { loadConfig } from '../../plugin/cli/config.ts'
import { runCommand, startCli } from '../helper/cli.ts'
import { until } from '../helper/until.ts'

const NODE = { url: 'http://10.0.0.5:23333' }

/** What a file comes to. */
async function load (t: Test, name: string, text: string, files: Record<string, string> = {}): Promise<unknown> {
  const dir = t.testdir({ [name]: text, ...files })
  return (await loadConfig(join(dir, name))).raw
}

t.test('JSON may have comments and trailing commas', async t => {
  t.same(await load(t, 'a.json', '{\n  // where\n  "nodes": [ { "url": "http://10.0.0.5:23333", /* one */ }, ],\n}'), { nodes: [NODE] })
})

t.test('YAML says the same', async t => {
  t.same(await load(t, 'a.yaml', '# where\nnodes:\n  - url: http://10.0.0.5:23333\ntimeouts: { encode: 5000 }\n'), { nodes: [NODE], timeouts: { encode: 5_000 } })
})

for (const [what, name, text, message] of [
  ['JSON that ends early', 'a.json', '{\n  "nodes": [', /a\.json:2:\d+: not valid JSON/],
  ['a wrong value in YAML', 'a.yaml', 'bypass: auto\ntimeouts:\n  encode: -5\n', /a\.yaml:3:11: timeouts\.encode must be >= 1, not -5$/],
  ['an unknown option in YAML', 'a.yaml', 'nodes:\n  - url: http://h:1\n    rol: encoder\n', /a\.yaml:3:10: unknown option nodes\[0\]\.rol/],
  ['a repeated key in YAML', 'a.yaml', 'bypass: auto\nbypass: never\n', /a\.yaml:2:1: not valid YAML \(Map keys must be unique\)/],
  ['an indentation of YAML that makes no sense', 'a.yaml', 'nodes:\n - url: x\n  role: y\n', /a\.yaml:\d+:\d+: not valid YAML/],
  ['an unknown tag of YAML', 'a.yaml', 'apiKeys: [!secret x]\n', /a\.yaml:1:\d+: not valid YAML/],
  ['two documents of YAML', 'a.yaml', 'bypass: auto\n---\nbypass: never\n', /a\.yaml:2:\d+: not valid YAML/],
  ['aliases of YAML that multiply', 'a.yaml', ['a: &a [x,x,x,x,x,x,x,x,x]', ...'bcdefgh'.split('').map((name, i) => `${name}: &${name} [${Array(9).fill(`*${'abcdefgh'[i]}`).join()}]`)].join('\n'), /a\.yaml:1:1: not valid YAML \(Excessive alias count/],
  ['a text in place of an object', 'a.yaml', 'just words', /a\.yaml:1:1: options must be an object/],
  ...['', '# nothing yet\n'].map(text => ['an empty file', 'a.yaml', text, /a\.yaml:1:1: not valid YAML \(empty file/] as const),
  ['an empty file', 'a.json', '', /a\.json:1:1: not valid JSON/],
  ['null', 'a.json', 'null', /a\.json:1:1: options must be an object, not null/],
  ['null', 'a.yaml', '~', /a\.yaml:1:1: options must be an object, not null/],
  ['credentials in a URL', 'a.json', '{ "nodes": [\n{ "url": "http://me:pw@h:1" }] }', /a\.json:2:10: nodes\[0\]\.url: node url must not hold credentials/],
  ['two spellings of one node', 'a.json', '{ "nodes": [ { "url": "http://h" },\n{ "url": "HTTP://H:80//" } ] }', /a\.json:2:10: nodes\[1\]\.url must/],
  ['one node, with /v1 and without', 'a.json', '{ "nodes": [ { "url": "http://h" },\n{ "url": "http://h/v1" } ] }', /a\.json:2:10: nodes\[1\]\.url must/],
  ['a slash too many', 'a.json', '{ "nodes": [ { "url": "http://h:1" },\n{ "url": "http://h:1/" } ] }', /a\.json:2:10: nodes\[1\]\.url must not be that of nodes\[0\]/],
  ['a variable that is not set', 'a.json', '{\n"adminKey": "${EPD_NOT_SET}" }', /a\.json:2:13: the environment variable EPD_NOT_SET is not set, and \$\{EPD_NOT_SET\} has no default/],
  ['a file that is not there', 'a.json', '{\n"adminKey": "${file:nowhere}" }', /a\.json:2:13: \$\{file:nowhere\}: there is no such file/],
  ['a folder in place of a file', 'a.json', '{\n"adminKey": "${file:.}" }', /a\.json:2:13: \$\{file:\.\} can't be read \(EISDIR\)/],
  ['no name', 'a.json', '{ "adminKey": "${}" }', /a\.json:1:15: \$\{\} must be \$\{NAME\}/],
  ['a variable inside a default', 'a.json', '{ "adminKey": "${A:-${B}}" }', /a default holds no variable/]
] as const) {
  t.test(`${what} is reported where it stands`, async t => {
    await t.rejects(load(t, name, text), { message })
  })
}

t.test('variables come from the environment and from files, with defaults', async t => {
  Object.assign(process.env, { EPD_T_KEY: 'from env', EPD_T_PORT: '8123', EPD_T_EMPTY: '', EPD_T_ON: 'true' })
  const text = '{ "adminKey": "${EPD_T_KEY}", "apiKeys": ["${file:./key}", "${file:gone:-spare}", "a-${EPD_T_EMPTY:-b}-$${c}"], "headers": "${EPD_T_ON}", "server": { "port": "${EPD_T_PORT}", "host": "${EPD_T_HOST:-::1}" }, "limits": { "items": "${EPD_T_ITEMS:-7}" } }'
  t.same(await load(t, 'a.json', text, { key: 'from file\n' }), {
    adminKey: 'from env', apiKeys: ['from file', 'spare', 'a-b-${c}'], headers: true, server: { port: 8_123, host: '::1' }, limits: { items: 7 }
  })
})

t.test('a text that looks like a number stays a text where an option wants one', async t => {
  Object.assign(process.env, { EPD_T_DIGITS: '12345' })
  t.same(await load(t, 'a.json', '{ "adminKey": "${EPD_T_DIGITS}", "retries": "${EPD_T_RETRIES:-0}" }'), { adminKey: '12345', retries: 0 })
})

t.test('a message does not show what a variable stands for', async t => {
  Object.assign(process.env, { EPD_T_SECRET: 'hunter2' })
  for (const text of ['{ "bypass": "${EPD_T_SECRET}" }', '{ "timeouts": ["${EPD_T_SECRET}"] }', '{ "nodes": [{ "url": "${EPD_T_SECRET}" }] }', '{ "embedded": { "x": "${EPD_T_SECRET}" } }', '{ "nodes": [{ "url": "http://h", "adapter": "${EPD_T_SECRET}" }] }']) {
    const error = await load(t, 'a.json', text).then(() => undefined, (err: Error) => err)
    t.match(error?.message, /a\.json:1:\d+/, text)
    t.notMatch(error?.message, /hunter2/, text)
  }
})

t.test('--check says whether a configuration is good, and starts nothing', async t => {
  const dir = t.testdir({
    'good.yaml': 'nodes: [{ url: "http://10.0.0.5:1" }]\n',
    'bad.json': '{ "nodez": [] }',
    'tls.json': '{ "server": { "tls": { "cert": "none.pem", "key": "none.key" } } }',
    'state.json': '{ "server": { "stateFile": "none/state.json" } }',
    'model.json': '{ "embedded": { "model": "none" } }',
    'here.json': '{ "embedded": { "model": "here" } }',
    here: {}
  })
  const [good, bad, tls, state, model, here, flag] = await Promise.all([...['good.yaml', 'bad.json', 'tls.json', 'state.json', 'model.json', 'here.json'].map(async name => await runCommand(['serve', '--check', '--config', join(dir, name)])), runCommand(['serve', '--check', '--port', 'x'])])
  t.match(good, { code: 0, stdout: /good\.yaml: ok, 1 node\n/, stderr: '' })
  t.match(bad, { code: 2, stdout: '', stderr: /bad\.json:1:12: unknown option nodez/ })
  t.match(tls, { code: 2, stdout: '', stderr: new RegExp(`server\\.tls\\.cert: can't read ${dir}/none\\.pem \\(ENOENT\\)`) })
  t.match(state, { code: 2, stdout: '', stderr: new RegExp(`server\\.stateFile: can't write into ${dir}/none \\(ENOENT\\)`) })
  t.match(model, { code: 2, stdout: '', stderr: new RegExp(`embedded\\.model: no such folder: ${dir}/none\n`) })
  t.match(here, { code: 0, stdout: /here\.json: ok/ }, 'the folder is beside the file, wherever the command runs')
  t.match(flag, { code: 2, stderr: /--port must/ })
})

t.test('a pipe, a device or a large file holds nothing up: it is refused by the option that names it', async t => {
  const dir = t.testdir({})
  execFileSync('mkfifo', [join(dir, 'pipe')])
  writeFileSync(join(dir, 'large'), '')
  truncateSync(join(dir, 'large'), 3 * 2 ** 30)
  for (const [file, why] of [[join(dir, 'pipe'), 'it is no file'], ['/dev/zero', 'it is no file'], [join(dir, 'large'), 'it has more than 16 MiB']] as const) {
    const refused = async (options: object): Promise<string> => {
      writeFileSync(join(dir, 'epd.json'), JSON.stringify(options))
      return (await runCommand(['serve', '--check', '--config', join(dir, 'epd.json')])).stderr
    }
    t.match(await refused({ adminKey: `\${file:${file}}` }), `epd.json:1:13: \${file:${file}} can't be read (${why})`)
    t.match(await refused({ server: { tls: { cert: file, key: file } } }), `server.tls.cert: can't read ${file} (${why})`)
    t.match(await refused({ server: { stateFile: file } }), `server.stateFile: ${file} can't be read as one (${why})`)
  }
})

/** A certificate of its own for localhost. */
function certificate (dir: string, name: string): { readonly cert: string, readonly key: string } {
  const [cert, key] = [join(dir, `${name}.pem`), join(dir, `${name}.key`)]
  execFileSync('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2', '-subj', `/CN=${name}`, '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1', '-keyout', key, '-out', cert], { stdio: 'ignore' })
  return { cert, key }
}

async function shownName (url: string): Promise<string> {
  const socket = connect({ host: '127.0.0.1', port: Number(new URL(url).port), rejectUnauthorized: false })
  return await new Promise((resolve, reject) => {
    socket.once('error', reject).once('secureConnect', () => {
      resolve(String((socket.getPeerCertificate() as DetailedPeerCertificate).subject.CN))
      socket.destroy()
    })
  })
}

t.test('host, port and TLS stand in the file; a renewed certificate is used without a restart, a broken one is not', async t => {
  const dir = mkdtempSync(join(tmpdir(), 'epd-tls-'))
  const first = certificate(dir, 'first')
  const second = certificate(dir, 'second')
  writeFileSync(join(dir, 'epd.yaml'), 'server:\n  host: 127.0.0.1\n  port: 0\n  tls: { cert: first.pem, key: first.key }\nembedded: false\n')
  const gateway = await startCli(t, ['serve', '--config', join(dir, 'epd.yaml')])
  t.match(gateway.url, /^https:\/\/127\.0\.0\.1:\d+$/)
  t.equal(await shownName(gateway.url), 'first')
  const moved = readFileSync(second.key)
  renameSync(second.cert, first.cert)
  await until(() => gateway.stderr().includes('the changed certificate is not used'), 'the half change is noticed', 20_000)
  t.equal(await shownName(gateway.url), 'first', 'a certificate without its key changes nothing')
  writeFileSync(first.key, moved)
  await until(async () => await shownName(gateway.url) === 'second', 'the new certificate is shown', 60_000, 200)
  t.equal(await gateway.stop(), 0)
})
