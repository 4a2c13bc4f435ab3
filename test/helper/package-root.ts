import { fileURLToPath } from 'node:url'

/** The folder of package.json; this file is compiled to dist/test/helper. */
export function packageRoot (): string {
  return fileURLToPath(new URL('../../..', import.meta.url)).replace(/\/$/, '')
}
