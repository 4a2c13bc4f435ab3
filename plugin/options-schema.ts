/**
 * The one schema of the options: of `app.register(epd, options)` and of epd.config.json alike. Types, bounds, defaults
 * (of alternatives: in options.ts, as a schema can not fill those in).
 */
const milliseconds = (value: number, minimum = 1) => ({ type: 'integer', minimum, maximum: 86_400_000, default: value }) as const
const bool = { type: 'boolean' } as const
const text = { type: 'string', minLength: 1 } as const
const url = { type: 'string', pattern: '^https?://[^\\s/?#]+[^\\s?#]*$', expects: 'an http:// or https:// URL' } as const

const node = {
  type: 'object',
  additionalProperties: false,
  required: ['url'],
  properties: {
    url,
    role: { enum: ['encoder', 'prefill', 'decode', 'hybrid'] },
    adapter: text,
    models: { type: 'array', items: text },
    apiKey: text,
    vision: { enum: ['full', 'features', 'none'] },
    maxPrefillTokens: { type: 'integer', minimum: 1 },
    speed: { type: 'number', exclusiveMinimum: 0 }
  }
} as const

const embedded = {
  expects: 'true, false or an object with encoders, engines, prefill, decode, backend, model',
  anyOf: [bool, {
    type: 'object',
    additionalProperties: false,
    properties: {
      encoders: { type: 'integer', minimum: 0, maximum: 16 },
      engines: { type: 'integer', minimum: 0, maximum: 16 },
      prefill: { type: 'integer', minimum: 0, maximum: 16 },
      decode: { type: 'integer', minimum: 0, maximum: 16 },
      backend: { enum: ['pytorch', 'turbomind'] },
      model: text
    }
  }]
} as const

const routes = {
  default: true,
  expects: 'true, false or an object with openai, nodes, health, metrics, traces',
  anyOf: [bool, {
    type: 'object',
    additionalProperties: false,
    properties: { openai: bool, nodes: bool, health: bool, metrics: bool, traces: bool }
  }]
} as const

const timeouts = {
  type: 'object',
  additionalProperties: false,
  default: {},
  properties: {
    connect: milliseconds(3_000),
    probe: milliseconds(15_000),
    link: milliseconds(10_000),
    encode: milliseconds(30_000),
    prefill: milliseconds(120_000),
    firstByte: milliseconds(120_000),
    answer: milliseconds(600_000),
    idle: milliseconds(120_000),
    total: milliseconds(600_000),
    grace: milliseconds(10_000, 0)
  }
} as const

const routing = {
  type: 'object',
  additionalProperties: false,
  default: {},
  properties: {
    encoderTokens: { type: 'integer', minimum: 1, default: 16_384 },
    smallItem: { type: 'integer', minimum: 0, default: 256 },
    disaggregate: { enum: ['auto', 'always', 'never'], default: 'auto' },
    disaggregateTokens: { type: 'integer', minimum: 0, default: 1_024 }
  }
} as const

const limits = {
  type: 'object',
  additionalProperties: false,
  default: {},
  properties: {
    body: { type: 'integer', minimum: 1_024, maximum: 1_073_741_824, default: 67_108_864 },
    items: { type: 'integer', minimum: 1, maximum: 512, default: 64 }
  }
} as const

const admission = {
  type: 'object',
  additionalProperties: false,
  default: {},
  properties: {
    visionTokens: { type: 'integer', minimum: 0, default: 262_144 },
    queue: { type: 'integer', minimum: 0, default: 256 },
    wait: milliseconds(30_000, 0),
    retryAfter: { type: 'integer', minimum: 1, maximum: 3_600, default: 1 }
  }
} as const

const telemetry = {
  type: 'object',
  additionalProperties: false,
  default: {},
  properties: {
    store: { type: 'object', expects: 'a TraceStore; give it in code' },
    captureContent: { type: 'boolean', default: false },
    traces: {
      default: true,
      expects: 'true, false or { "max": number of traces kept }',
      anyOf: [bool, {
        type: 'object',
        additionalProperties: false,
        properties: { max: { type: 'integer', minimum: 1, maximum: 1_000_000 } }
      }]
    }
  }
} as const

export const optionsSchema = {
  $id: 'epd.config.json',
  type: 'object',
  additionalProperties: false,
  properties: {
    $schema: { type: 'string' },
    embedded,
    nodes: { type: 'array', items: node, default: [] },
    adapters: { type: 'array', default: [], items: { type: 'object', expects: 'an adapter (an object with specificationVersion "v1"); give it in code', required: ['name', 'specificationVersion'], properties: { name: text, specificationVersion: { const: 'v1' } } } },
    prefix: { type: 'string', pattern: '^(/.*)?$', default: '', expects: 'empty or a path that begins with /' },
    routes,
    attach: { type: 'array', default: [], items: { type: 'string', pattern: '^/', expects: 'a path that begins with /' } },
    bypass: { enum: ['auto', 'never'] },
    routing,
    timeouts,
    retries: { type: 'integer', minimum: 0, maximum: 1, default: 1 },
    limits,
    admission,
    apiKeys: { type: 'array', items: text, default: [] },
    adminKey: text,
    allowedNetworks: { type: 'array', default: [], items: { type: 'string', pattern: '^[0-9a-fA-F.:]+(/[0-9]{1,3})?$', expects: 'an IP address or a network such as 10.0.0.0/8' } },
    headers: { type: 'boolean', default: true },
    ui: bool,
    telemetry,
    tenant: { expects: "a request header's name or, in code, a function", anyOf: [{ type: 'string', minLength: 1 }, { isFunction: true }] },
    logLevel: { enum: ['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'] }
  }
} as const
