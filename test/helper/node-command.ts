/** Node.js flags of every process that a test starts. */
export const nodeArgs: readonly string[] = ['--import', new URL('./end-with-parent.js', import.meta.url).href]

/**
 * How a test starts Node.js. tap loads the hooks that coverage needs into every process a test starts, by NODE_OPTIONS;
 * they cost an engine half a second, and only `npm run coverage` wants them.
 */
export function nodeCommand (args: readonly string[]): { readonly file: string, readonly args: string[] } {
  if (process.env.EPD_COVERAGE === '1') return { file: process.execPath, args: [...nodeArgs, ...args] }
  return { file: 'env', args: ['-u', 'NODE_OPTIONS', process.execPath, ...nodeArgs, ...args] }
}

/** The same for `fork`, as its options. */
export function forkOptions (): { readonly execPath: string, readonly execArgv: string[] } {
  const { file, args } = nodeCommand([])
  return { execPath: file, execArgv: args }
}
