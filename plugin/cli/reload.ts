import type { FastifyPluginAsync } from 'fastify'
import { epdError, OptionsError } from '../errors.ts'
import type { Gateway } from '../gateway.ts'
import { onRouteError } from '../http/error-answer.ts'
import { requireOperator } from '../http/routes/guard.ts'
import { resolveOptions, type EpdOptions } from '../options/index.ts'
import { reload, type Reloaded } from '../reload.ts'
import { UsageError } from './usage.ts'

interface ReloadingOptions {
  readonly gateway: Gateway
  readonly load: () => Promise<EpdOptions>
  /** After what was loaded is in force here. */
  readonly applied?: () => Promise<void>
}

/** SIGHUP and POST /epd/reload read the configuration again. One that is broken changes nothing. */
export const reloading: FastifyPluginAsync<ReloadingOptions> = async function reloading (app, { gateway, load, applied }) {
  let last: Promise<unknown> = Promise.resolve()
  const once = async (): Promise<Reloaded> => {
    const reloaded = reload(gateway, resolveOptions(await load()))
    await applied?.()
    return reloaded
  }
  // One after the other: of two that overlap, the older file could win.
  const next = async (): Promise<Reloaded> => await (last = last.then(once, once)) as Reloaded

  app.setErrorHandler(onRouteError)
  app.addHook('onRequest', requireOperator(gateway))
  app.post('/epd/reload', async () => {
    try {
      return await next()
    } catch (err) {
      throw isMistake(err) ? epdError('EPD_ERR_CONFIGURATION', [err.message]) : err
    }
  })

  const onHangUp = (): void => {
    next().catch((err: unknown) => { app.log.error(isMistake(err) ? { reason: err.message } : { err }, 'the configuration is not used: the old one stays in force') })
  }
  process.on('SIGHUP', onHangUp)
  app.addHook('onClose', async () => { process.off('SIGHUP', onHangUp) })
}

function isMistake (err: unknown): err is Error {
  return err instanceof UsageError || err instanceof OptionsError
}
