import { randomInt } from 'node:crypto'
import type { LoadedModel } from '../../models/family.ts'
import type { SamplingParams } from '../sequence/sampling.ts'
import { isObject, readBoolean, readInteger, readNumber, readStrings, refuse, type Json } from './fields.ts'

/** How many choices, how tokens are sampled, and where a choice ends. */
export interface GenerationParams {
  readonly n: number
  /** Parameters of the first choice; the others have other seeds. */
  readonly sampling: SamplingParams
  /** undefined: as many as fit. */
  readonly maxTokens: number | undefined
  readonly stop: readonly string[]
  readonly includeStop: boolean
  readonly skipSpecial: boolean
  readonly stream: boolean
}

const MAX_CHOICES = 128
const MAX_STOPS = 16
/** Looking for the beginning of a stop string takes the square of its length. */
const MAX_STOP_LENGTH = 1024

function readLogitBias (body: Json, vocab: number): Array<[number, number]> {
  const value = body.logit_bias ?? {}
  if (!isObject(value)) refuse('logit_bias', '"logit_bias" must map token ids to numbers')
  return Object.entries(value).map(([key, bias]) => {
    const token = Number(key)
    if (!/^\d{1,9}$/.test(key) || token >= vocab) refuse('logit_bias', `"logit_bias": "${key.slice(0, 40)}" is no token id below ${vocab}`)
    if (typeof bias !== 'number' || !(bias >= -100 && bias <= 100)) refuse('logit_bias', '"logit_bias" must hold numbers from -100 to 100')
    return [token, bias]
  })
}

function readStopIds (body: Json, vocab: number): number[] {
  const value = body.stop_token_ids ?? []
  const valid = Array.isArray(value) && value.length <= 64 && value.every(id => Number.isSafeInteger(id) && (id as number) >= 0 && (id as number) < vocab)
  if (!valid) refuse('stop_token_ids', `"stop_token_ids" must be a list of token ids below ${vocab}`)
  return value as number[]
}

/** Defaults from the model's generation_config.json. */
function defaults (generation: Json): { temperature: number, topP: number, topK: number } {
  const number = (key: string, fallback: number): number => typeof generation[key] === 'number' ? generation[key] : fallback
  return {
    temperature: generation.do_sample === false ? 0 : number('temperature', 1),
    topP: number('top_p', 1),
    topK: generation.do_sample === true ? number('top_k', 0) : 0
  }
}

function readSampling (body: Json, model: LoadedModel, topLogprobs: number | undefined): SamplingParams {
  const { vocab, eosIds } = model.text
  const own = defaults(model.generationConfig)
  const seed = readInteger(body, 'seed', { min: -(2 ** 53 - 1), max: 2 ** 53 - 1, fallback: undefined })
  const topK = readInteger(body, 'top_k', { min: -1, max: vocab, fallback: own.topK })
  return {
    temperature: readNumber(body, 'temperature', { min: 0, max: 2, fallback: own.temperature }),
    topP: readNumber(body, 'top_p', { min: 0, max: 1, fallback: own.topP }),
    // -1 is how vLLM writes "off".
    topK: Math.max(topK, 0),
    minP: readNumber(body, 'min_p', { min: 0, max: 1, fallback: 0 }),
    seed: seed === undefined ? randomInt(2 ** 32) : (seed ^ Math.floor(seed / 2 ** 32)) >>> 0,
    repetitionPenalty: readNumber(body, 'repetition_penalty', { min: 0.01, max: 10, fallback: 1 }),
    presencePenalty: readNumber(body, 'presence_penalty', { min: -2, max: 2, fallback: 0 }),
    frequencyPenalty: readNumber(body, 'frequency_penalty', { min: -2, max: 2, fallback: 0 }),
    logitBias: readLogitBias(body, vocab),
    minTokens: readInteger(body, body.min_tokens === undefined ? 'min_new_tokens' : 'min_tokens', { min: 0, max: model.text.maxPositions, fallback: 0 }),
    ignoreEos: readBoolean(body, 'ignore_eos', false),
    eosIds,
    stopIds: readStopIds(body, vocab),
    topLogprobs
  }
}

function readStops (body: Json): string[] {
  const stops = readStrings(body, 'stop', MAX_STOPS)
  if (stops.some(stop => stop.length > MAX_STOP_LENGTH)) refuse('stop', `"stop" must hold strings of at most ${MAX_STOP_LENGTH} characters`)
  return stops
}

/** `stream_options` are read where chunks are written. */
function readStream (body: Json): boolean {
  const stream = readBoolean(body, 'stream', false)
  const options = body.stream_options ?? undefined
  if (options === undefined) return stream
  if (!isObject(options)) refuse('stream_options', '"stream_options" must be an object')
  if (!stream) refuse('stream_options', '"stream_options" is only allowed when "stream" is true')
  readBoolean(options, 'include_usage', false)
  return stream
}

/**
 * What chat and completions have in common. `topLogprobs`: undefined without log probabilities.
 * @throws EngineError `invalid_request` naming the field.
 */
export function readGeneration (body: Json, model: LoadedModel, topLogprobs: number | undefined): GenerationParams {
  // With zero tokens there would be no finish reason.
  const limit = { min: 1, max: Number.MAX_SAFE_INTEGER, fallback: undefined }
  const configured = model.generationConfig.max_new_tokens
  return {
    n: readInteger(body, 'n', { min: 1, max: MAX_CHOICES, fallback: 1 }),
    sampling: readSampling(body, model, topLogprobs),
    maxTokens: readInteger(body, 'max_completion_tokens', limit) ?? readInteger(body, 'max_tokens', limit) ??
      (typeof configured === 'number' ? configured : undefined),
    stop: readStops(body),
    includeStop: readBoolean(body, 'include_stop_str_in_output', false),
    skipSpecial: readBoolean(body, 'skip_special_tokens', true),
    stream: readStream(body)
  }
}
