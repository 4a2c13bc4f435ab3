/** Node.js flags of every process that a test starts. */
export const nodeArgs: readonly string[] = ['--import', new URL('./end-with-parent.js', import.meta.url).href]

/** How a test starts Node.js. */
export function nodeCommand (args: readonly string[]): { readonly file: string, readonly args: string[] } {
  return { file: process.execPath, args: [...nodeArgs, ...args] }
}

/** The same for `fork`, as its options. */
export function forkOptions (): { readonly execPath: string, readonly execArgv: string[] } {
  return { execPath: process.execPath, execArgv: [...nodeArgs] }
}
