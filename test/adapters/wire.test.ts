import t from 'tap'
import { errorTypeOf, openAiError } from '../../adapters/wire/openai-error.ts'
import { ROLE_FROM_WIRE, ROLE_TO_WIRE } from '../../adapters/wire/roles.ts'

t.test('the type of an error follows from its status', async t => {
  const rows = [
    [400, 'invalid_request_error'], [401, 'authentication_error'], [403, 'permission_error'], [404, 'invalid_request_error'], [413, 'invalid_request_error'],
    [429, 'rate_limit_error'], [499, 'invalid_request_error'], [500, 'server_error'], [503, 'server_error'], [504, 'server_error']
  ] as const
  for (const [status, type] of rows) t.equal(errorTypeOf(status), type, String(status))
  t.same(openAiError(404, 'no such model', 'model_not_found', 'model'), { message: 'no such model', type: 'invalid_request_error', code: 'model_not_found', param: 'model' })
})

t.test('roles are LMDeploy\'s integers, both ways', async t => {
  t.same(ROLE_TO_WIRE, { hybrid: 1, prefill: 2, decode: 3, encoder: 4 })
  for (const [role, wire] of Object.entries(ROLE_TO_WIRE)) t.equal(ROLE_FROM_WIRE[wire], role)
})
