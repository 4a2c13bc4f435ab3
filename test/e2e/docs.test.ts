/** Runs the commands that the documentation gives. */
import { spawn, spawnSync } from 'node:child_process'
import { readFile, mkdir, writeFile } from 'node:fs/promises'
import { once } from 'node:events'
import { join } from 'node:path'
import t from 'tap'
import { packageRoot } from '../helper/package-root.ts'
import { freePort } from '../helper/free-port.ts'
import { nodeArgs } from '../helper/node-command.ts'

const ROOT = packageRoot()

/** The fenced code blocks of one language, in order. */
async function blocks (file: string, language: string): Promise<string[]> {
  const text = await readFile(join(ROOT, file), 'utf8')
  return [...text.matchAll(new RegExp('^```' + language + '\\n([\\s\\S]*?)^```', 'gm'))].map(found => found[1]!)
}

const curl = spawnSync('curl', ['--version']).status === 0

await t.test('docs/engines.md: E -> PD and P -> D by hand answer the questions and free the leases', { skip: curl ? false : 'curl is not installed' }, async t => {
  const cli = join(import.meta.dirname, '..', '..', 'plugin', 'cli', 'main.js')
  const ports = (await Promise.all(Array.from({ length: 4 }, freePort))).map(String)
  const script = (await blocks('docs/engines.md', 'sh')).join('\n')
    .replaceAll(/2333[3-6]/g, port => ports[Number(port) - 23333]!)
    .replaceAll('npx fastify-epd', [process.execPath, ...nodeArgs, cli].join(' '))
    .replaceAll('docs/examples', join(ROOT, 'docs', 'examples'))
    // The files are read below.
    .replaceAll(/^rm .*$/gm, '')
  const dir = t.testdir({})
  await mkdir(dir, { recursive: true })
  await writeFile(join(dir, 'steps.sh'), script)
  const shell = spawn('bash', ['-e', '-m', 'steps.sh'], { cwd: dir, stdio: ['ignore', 'pipe', 'pipe'] })
  let output = ''
  shell.stdout.on('data', (data: Buffer) => { output += data.toString() })
  shell.stderr.on('data', (data: Buffer) => { output += data.toString() })
  await once(shell, 'close')
  const answerIn = async (file: string): Promise<string> => (JSON.parse(await readFile(join(dir, file), 'utf8')) as { choices: Array<{ message: { content: string } }> }).choices[0]!.message.content
  t.equal(await answerIn('answer.json'), '2', output)
  const handed = await answerIn('handed.json')
  t.equal(handed, '2 red circles, 1 blue star and 1 green square.')
  t.match(await readFile(join(ROOT, 'docs', 'engines.md'), 'utf8'), `The answer is \`${handed}\``, 'as the page says')
  t.match(output, /epd_leases_open 0/)
  t.match(output, /epd_acks_total 1/)
  t.match(output, /epd_encoded_items_total 1/)
})
