/** Programs that some tests need and npm does not have. */
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/**
 * A program: the one that the environment variable names, one that is installed, or the first of these packages of Debian
 * that can be installed, when this is root there. Undefined when there is none.
 */
export function systemProgram (variable: string, places: readonly string[], packages: readonly string[]): string | undefined {
  const named = process.env[variable]
  const find = (): string | undefined => [...named === undefined ? [] : [named], ...places].find(path => existsSync(path))
  return find() ?? (install(packages) ? find() : undefined)
}

/** Test files that run at the same time wait for one another: apt-get refuses to run twice. */
function install (packages: readonly string[]): boolean {
  if (process.getuid?.() !== 0 || !existsSync('/usr/bin/apt-get')) return false
  const script = ['apt-get update', packages.map(name => `apt-get install -y --no-install-recommends ${name}`).join(' || ')].join('; ')
  return spawnSync('flock', [join(tmpdir(), 'fastify-epd-packages.lock'), 'sh', '-c', script], { stdio: 'ignore', timeout: 200_000, env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' } }).status === 0
}
