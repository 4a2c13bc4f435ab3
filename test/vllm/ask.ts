/** Asks a server, or a gateway before servers, and says what came of it: the tokens, or a clear error. */
import { post } from '../helper/fake-gateway.ts'

export interface Told {
  readonly status: number
  /** By `return_token_ids`; undefined with an error. */
  readonly tokens?: readonly number[]
  readonly error?: { readonly message?: string, readonly code?: unknown, readonly param?: unknown }
  readonly plan: string | null
  readonly reason: string | null
  /** The encoder of each picture. */
  readonly encoders?: readonly string[]
}

interface Choice { readonly token_ids?: readonly number[] | null }
interface Answer { readonly choices?: readonly Choice[], readonly error?: Told['error'] }

export async function ask (url: string, body: object): Promise<Told> {
  const response = await post(`${url}/v1/chat/completions`, { max_tokens: 6, temperature: 0, return_token_ids: true, ...body })
  const text = await response.text()
  const streamed = response.headers.get('content-type')?.startsWith('text/event-stream') === true
  const parts = streamed ? text.split('\n\n').filter(event => event.startsWith('data: {')).map(event => JSON.parse(event.slice(6)) as Answer) : [JSON.parse(text) as Answer]
  const error = parts.find(part => part.error !== undefined)?.error
  const told = { status: response.status, plan: response.headers.get('x-epd-plan'), reason: response.headers.get('x-epd-reason'), encoders: response.headers.get('x-epd-encoders')?.split(',') ?? [] }
  if (error !== undefined) return { ...told, error }
  if (streamed && !text.endsWith('data: [DONE]\n\n')) return { ...told, error: { message: 'the stream ends before [DONE]' } }
  return { ...told, tokens: parts.flatMap(part => part.choices?.[0]?.token_ids ?? []) }
}
