import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import t from 'tap'
import { engineOptions } from '../../plugin/cli/engine-flags.ts'
import { UsageError } from '../../plugin/cli/usage.ts'
import { runCli, runCommand } from '../helper/cli.ts'

t.test('a mistake in the flags is reported with the flag and what would be right', async t => {
  const cases: ReadonlyArray<readonly [args: string[], message: RegExp]> = [
    [[], /--role must be one of encoder, hybrid, prefill, decode$/],
    [['--role', 'painter'], /--role must be one of .*'painter'/],
    [['--role', 'encoder', '--model', '/no/such/folder'], /--model: no such folder: \/no\/such\/folder/],
    [['--role', 'encoder', '--port', '99999'], /--port must be a whole number from 0 to 65535/],
    [['--role', 'encoder', '--max-batch-size', '0'], /--max-batch-size must be a whole number from 1 to 4096, not '0'/],
    [['--role', 'encoder', '--threads', '1.5'], /--threads must be a whole number/],
    [['--role', 'encoder', '--device', 'tpu'], /--device must be cpu, cuda or cuda:N/],
    [['--role', 'encoder', '--proxy-url', 'localhost'], /--proxy-url must be an http or https URL/],
    [['--role', 'encoder', '--no-vision'], /--no-vision makes no sense/],
    [['--role', 'decode', '--no-vision'], /never opens the vision encoder/],
    [['--role', 'decode', '--feature-blocks', '8'], /--feature-blocks makes no sense with --role decode/],
    [['--role', 'hybrid', '--host', '0.0.0.0', '--proxy-url', 'http://gw:1'], /--public-url/],
    [['--role', 'hybrid', '--curve-public-key-file', '/dev/null'], /go together/],
    [['--role', 'hybrid', '--curve-allowed-keys-file', '/dev/null'], /needs --curve-public-key-file/],
    [['--role', 'hybrid', '--curve-public-key-file', '/dev/null', '--curve-secret-key-file', '/dev/null'], /must hold keys of 40 Z85/],
    [['--role', 'hybrid', '--session-len', '512'], /--session-len is for --backend turbomind/],
    [['--role', 'hybrid', '--backend', 'turbomind', '--block-size', '16'], /--block-size is for --backend pytorch/],
    [['--role', 'hybrid', '--log-level', 'loud'], /--log-level must be one of/]
  ]
  for (const [args, message] of cases) {
    await t.rejects(engineOptions(args), { constructor: UsageError, message }, args.join(' '))
  }
})

t.test('flags become the options of an engine', async t => {
  const dir = t.testdir()
  const key = (name: string): string => {
    const file = join(dir, name)
    writeFileSync(file, name.padEnd(40, '0') + '\n')
    return file
  }
  const flags = await engineOptions(['--role', 'hybrid', '--no-vision', '--model', dir, '--proxy-url', 'http://127.0.0.1:8000/', '--device', 'cuda:1',
    '--lease-seconds', '5', '--kv-blocks', '64', '--sharing', '3', '--allowed-media-domains', 'A.example, b.example', '--curve-public-key-file', key('pub'),
    '--curve-secret-key-file', key('sec'), '--curve-allowed-keys-file', key('peer'), '--grace-seconds', '0'])
  t.match(flags, {
    graceSeconds: 0,
    exitWithParent: false,
    start: {
      role: 'hybrid',
      backend: 'pytorch',
      vision: false,
      modelDir: dir,
      proxyUrl: 'http://127.0.0.1:8000',
      device: 'cuda:1',
      host: '127.0.0.1',
      port: 0,
      leaseMs: 5_000,
      kvBlocks: 64,
      sharing: 3,
      media: { allowPrivate: false, allowedDomains: ['a.example', 'b.example'] },
      curve: { publicKey: 'pub'.padEnd(40, '0'), secretKey: 'sec'.padEnd(40, '0') },
      allowedPeers: ['peer'.padEnd(40, '0')]
    }
  })
  t.equal(flags!.start.featureBlocks, undefined, 'what is not given is left to the engine')
})

t.test('the command ends with 2 when called wrongly and 1 when it fails, and writes nothing but URLs and help to stdout', async t => {
  const [unknown, level, turbomind, decode, broken] = await Promise.all([
    runCli(['engine', '--role', 'encoder', '--frobnicate']),
    runCommand(['serve', '--log-level', 'loud']),
    runCommand(['engine', '--role', 'decode', '--backend', 'turbomind']),
    runCommand(['engine', '--role', 'decode', '--no-vision']),
    runCli(['engine', '--role', 'encoder', '--model', t.testdir()])
  ])
  t.match(unknown, { code: 2, stdout: '', stderr: /Unknown option '--frobnicate'/ })
  t.match(level, { code: 2, stdout: '', stderr: /--log-level must be one of trace, .*'loud'/ })
  t.match(turbomind, { code: 2, stdout: '', stderr: /TurboMind has no disaggregated prefill\/decode/ })
  t.match(decode, { code: 2, stdout: '', stderr: /--no-vision makes no sense with --role decode/ })
  t.match(broken, { code: 1, stdout: '' }, 'an empty model folder')
  const [help, traceHelp] = await Promise.all([runCommand(['engine', '--help']), runCommand(['trace', '--help'])])
  t.match(help, { code: 0, stdout: /Usage: fastify-epd engine/, stderr: '' })
  t.match(traceHelp, { code: 0, stdout: /Usage: fastify-epd trace/ })
})

t.test('trace says what is wrong when it can not answer', async t => {
  const server = createServer((_request, response) => { response.end('<!doctype html>a page for every path') }).listen(0, '127.0.0.1')
  t.teardown(() => server.close())
  await once(server, 'listening')
  const other = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const [wrong, schemeless, down, foreign, followed] = await Promise.all([
    runCommand(['trace', 'abc']),
    runCommand(['trace', '--url', 'localhost:8000']),
    runCli(['trace', '--url', 'http://127.0.0.1:1']),
    runCommand(['trace', '--url', other]),
    runCommand(['trace', '--follow', '--url', other])
  ])
  t.match(wrong, { code: 2, stderr: /32 hexadecimal digits/ })
  t.match(schemeless, { code: 2, stderr: /--url must be an http or https URL/ })
  t.match(down, { code: 1, stderr: /can't reach the gateway at http:\/\/127\.0\.0\.1:1 \(ECONNREFUSED\)/ })
  for (const one of [foreign, followed]) t.match(one, { code: 1, stderr: /keeps no traces: it is not a fastify-epd gateway/ })
})
