/** The package as npm would install it beside a consumer, made of the files it packs and of links to its dependencies. */
import { spawnSync } from 'node:child_process'
import { cp, mkdir, mkdtemp, readFile, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import type { Test } from 'tap'
import { packageRoot } from './package-root.ts'

export interface Installed {
  /** The consumer's folder, outside of the project. */
  readonly dir: string
  /** The package's folder below it. */
  readonly root: string
}

/** Paths of the files that `npm pack` packs. */
export function packedFiles (): string[] {
  const { stdout, stderr } = spawnSync('npm', ['pack', '--dry-run', '--json', '--ignore-scripts'], { cwd: packageRoot(), encoding: 'utf8' })
  const found = /"files": (\[[^\]]*\])/.exec(stdout)
  if (found === null) throw new Error(`npm pack: ${stderr}`)
  return (JSON.parse(found[1]!) as Array<{ path: string }>).map(({ path }) => path)
}

/** Installs the package without its optional peers: `npm install fastify fastify-epd`. */
export async function installLight (t: Test): Promise<Installed> {
  const dir = await mkdtemp(join(tmpdir(), 'fastify-epd-light-'))
  t.teardown(() => rm(dir, { recursive: true, force: true }))
  const root = join(dir, 'node_modules', 'fastify-epd')
  await Promise.all(packedFiles().map(file => cp(join(packageRoot(), file), join(root, file))))
  for (const name of await dependencies()) await link(dir, name)
  return { dir, root }
}

/** Links a package of the project into a consumer's node_modules. */
export async function link (dir: string, name: string): Promise<void> {
  const path = join(dir, 'node_modules', name)
  await mkdir(dirname(path), { recursive: true })
  await symlink(join(packageRoot(), 'node_modules', name), path)
}

/** Everything that is installed for users, by package-lock.json. */
async function dependencies (): Promise<string[]> {
  const { packages } = JSON.parse(await readFile(join(packageRoot(), 'package-lock.json'), 'utf8')) as { packages: Record<string, { dev?: boolean, optional?: boolean }> }
  return Object.entries(packages)
    .filter(([path, { dev, optional }]) => /^node_modules\/(@[^/]+\/)?[^/]+$/.test(path) && dev !== true && optional !== true)
    .map(([path]) => path.slice('node_modules/'.length))
}
