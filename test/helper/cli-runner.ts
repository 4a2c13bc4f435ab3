/** Runs commands of `fastify-epd` for a test, one after the other, and answers each with what its process would have given. */
import { run } from '../../plugin/cli/run.ts'

export interface Run { readonly args: readonly string[], readonly env: NodeJS.ProcessEnv, readonly cwd: string }

export interface Ran { readonly code: number, readonly stdout: string, readonly stderr: string }

const output = { stdout: '', stderr: '' }
for (const name of ['stdout', 'stderr'] as const) {
  process[name].write = (chunk: string | Uint8Array, ...rest: unknown[]): boolean => {
    output[name] += String(chunk)
    const done = rest.at(-1)
    if (typeof done === 'function') process.nextTick(done)
    return true
  }
}

process.on('message', ({ args, env, cwd }: Run) => {
  process.env = { ...env }
  process.chdir(cwd)
  run([...args]).then(code => {
    process.send!({ code, ...output } satisfies Ran)
    Object.assign(output, { stdout: '', stderr: '' })
  }, (err: unknown) => { throw err })
})
