/** The package as npm would install it beside a consumer, made of the files that it ships and of links to its dependencies. */
import { cp, mkdir, mkdtemp, readdir, readFile, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join, relative } from 'node:path'
import type { Test } from 'tap'
import { packageRoot } from './package-root.ts'

export interface Installed {
  /** The consumer's folder, outside of the project. */
  readonly dir: string
  /** The package's folder below it. */
  readonly root: string
}

/** Installs the package without its optional peers: `npm install fastify fastify-epd`. */
export async function installLight (t: Test): Promise<Installed> {
  const dir = await mkdtemp(join(tmpdir(), 'fastify-epd-light-'))
  t.teardown(() => rm(dir, { recursive: true, force: true }))
  const root = join(dir, 'node_modules', 'fastify-epd')
  const { files, not } = await shipped()
  for (const path of files) await cp(join(packageRoot(), path), join(root, path), { recursive: true, filter: source => !not.includes(relative(packageRoot(), source)) })
  for (const name of await dependencies()) await link(dir, name)
  return { dir, root }
}

/** Links a package of the project into a consumer's node_modules. */
export async function link (dir: string, name: string): Promise<void> {
  const path = join(dir, 'node_modules', name)
  await mkdir(dirname(path), { recursive: true })
  await symlink(join(packageRoot(), 'node_modules', name), path)
}

/** Files and folders of package.json's `files`, and itself; and what it excepts. What npm makes of them is test/package/package.test.ts's: it takes npm seconds. */
async function shipped (): Promise<{ readonly files: readonly string[], readonly not: readonly string[] }> {
  const { files } = JSON.parse(await readFile(join(packageRoot(), 'package.json'), 'utf8')) as { files: string[] }
  const paths = await Promise.all(files.filter(path => !path.startsWith('!')).map(async path => {
    const [, folder, end] = /^(.*)\/\*(\.\w+)$/.exec(path) ?? []
    return folder === undefined ? path : (await readdir(join(packageRoot(), folder))).filter(name => name.endsWith(end!)).map(name => join(folder, name))
  }))
  return { files: ['package.json', ...paths.flat()], not: files.filter(path => path.startsWith('!')).map(path => path.slice(1)) }
}

/** Everything that is installed for users, by package-lock.json. */
async function dependencies (): Promise<string[]> {
  const { packages } = JSON.parse(await readFile(join(packageRoot(), 'package-lock.json'), 'utf8')) as { packages: Record<string, { dev?: boolean, optional?: boolean }> }
  return Object.entries(packages)
    .filter(([path, { dev, optional }]) => /^node_modules\/(@[^/]+\/)?[^/]+$/.test(path) && dev !== true && optional !== true)
    .map(([path]) => path.slice('node_modules/'.length))
}
