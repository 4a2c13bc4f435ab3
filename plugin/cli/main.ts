#!/usr/bin/env node
/** The process of a command. */
import { run } from './run.ts'

// A reader may close the pipe early (`| head`): that must not end a server.
for (const stream of [process.stdout, process.stderr]) stream.on('error', (err: NodeJS.ErrnoException) => { if (err.code !== 'EPIPE') throw err })

run(process.argv.slice(2)).then(code => { process.exitCode = code })
