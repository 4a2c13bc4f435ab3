import { createHash, type Hash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { open, readFile, readdir, stat } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'
import { familyFor } from './families.ts'
import { ModelError, type GraphSignature, type Json, type LoadModelOptions, type LoadedModel, type ModelFiles, type ModelSource } from './family.ts'
import { readGraphSignature } from './graph-signature.ts'
import { readTextShape } from './text-shape.ts'

/** Weights up to this size are hashed whole; of larger ones the size and this much in samples. Bytes. */
const MAX_HASHED_BYTES = 512 * 1024 * 1024
const SAMPLE_BYTES = 1024 * 1024

async function readIn (dir: string, file: string): Promise<Buffer> {
  try {
    return await readFile(join(dir, file))
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException
    throw new ModelError(code === 'ENOENT' ? `${file} is missing in the model folder ${dir}` : `${file} in the model folder ${dir} can't be read (${String(code)})`, { cause })
  }
}

function parseJson (bytes: Buffer, file: string): Json {
  try {
    const value: unknown = JSON.parse(bytes.toString('utf8'))
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Json
  } catch (cause) {
    throw new ModelError(`${file} is not valid JSON: ${(cause as Error).message}`, { cause })
  }
  throw new ModelError(`${file} must hold a JSON object`)
}

async function readOptional (dir: string, file: string): Promise<Json> {
  try {
    return parseJson(await readFile(join(dir, file)), file)
  } catch (err) {
    if ((err as NodeJS.ErrnoException).code === 'ENOENT') return {}
    throw err
  }
}

/** Ids of added tokens, what placeholders and markers of a prompt are, and of what else the family asks for. */
function specialTokens (tokenizer: Json, vocabulary: readonly string[] = []): Record<string, number> {
  const added = Array.isArray(tokenizer.added_tokens) ? tokenizer.added_tokens as Array<{ id?: unknown, content?: unknown }> : []
  const tokens: Record<string, number> = Object.create(null) as Record<string, number>
  for (const { id, content } of added) if (typeof id === 'number' && typeof content === 'string') tokens[content] = id
  const { vocab = {} } = (tokenizer.model ?? {}) as { vocab?: Readonly<Record<string, unknown>> }
  for (const text of vocabulary) if (typeof vocab[text] === 'number') tokens[text] ??= vocab[text]
  return tokens
}

async function graphFile (dir: string, graph: string, variant: string | undefined): Promise<string> {
  const file = join('onnx', variant === undefined || variant === '' ? `${graph}.onnx` : `${graph}_${variant}.onnx`)
  const path = join(dir, file)
  const found = await stat(path).catch(() => undefined)
  if (found?.isFile() !== true) throw new ModelError(`${file} is missing in the model folder ${dir}`)
  return path
}

async function hashFile (hash: Hash, path: string): Promise<void> {
  const { size } = await stat(path)
  hash.update(`${basename(path)}:${size}\n`)
  if (size <= MAX_HASHED_BYTES) {
    for await (const chunk of createReadStream(path, { highWaterMark: 1024 * 1024 })) hash.update(chunk as Buffer)
    return
  }
  const file = await open(path, 'r')
  try {
    const buffer = Buffer.alloc(SAMPLE_BYTES)
    const step = Math.floor(size / (MAX_HASHED_BYTES / SAMPLE_BYTES))
    for (let at = 0; at < size; at += step) {
      const { bytesRead } = await file.read(buffer, 0, buffer.length, at)
      hash.update(buffer.subarray(0, bytesRead))
    }
  } finally {
    await file.close()
  }
}

/** Identity of the vision graph with its external data, which lies beside it under its name and a suffix. */
async function visionIdentity (path: string): Promise<string> {
  const hash = createHash('sha256')
  const beside = await readdir(join(path, '..'))
  const name = basename(path)
  const data = beside.filter(file => file.startsWith(name) && file !== name).sort()
  for (const file of [name, ...data]) await hashFile(hash, join(path, '..', file))
  return hash.digest('hex')
}

/** Element type of features: the vision graph's output, or what the decoder takes. */
function featureType (vision: GraphSignature | undefined, embed: GraphSignature | undefined, config: Json): 'float32' | 'float16' {
  const type = vision?.outputs[0]?.type ?? embed?.outputs[0]?.type ?? (config.torch_dtype ?? config.dtype)
  if (type === 'float32' || type === 'float16') return type
  if (vision === undefined && embed === undefined) return 'float32'
  throw new ModelError(`onnx/vision_encoder.onnx: features are ${String(type)}; engines transfer float32 and float16`)
}

async function graphs (files: ModelFiles): Promise<LoadedModel['graphs']> {
  const read = async (path: string | undefined): Promise<GraphSignature | undefined> => path === undefined ? undefined : await readGraphSignature(path)
  const [vision, embed, decoder] = await Promise.all([read(files.vision), read(files.embed), read(files.decoder)])
  return { vision, embed, decoder }
}

/**
 * Reads a model folder in the layout transformers.js and optimum export. Opens only the graphs asked for, and of those
 * only names and shapes.
 * @throws ModelError naming the file and what is wrong with it.
 */
export async function loadModel (folder: string, options: LoadModelOptions): Promise<LoadedModel> {
  const dir = resolve(folder)
  const identity = createHash('sha256')
  const parsed: Record<string, Json> = {}
  for (const file of ['config.json', 'preprocessor_config.json', 'tokenizer.json']) {
    const bytes = await readIn(dir, file)
    identity.update(`${file}:${bytes.length}\n`).update(bytes)
    parsed[file] = parseJson(bytes, file)
  }
  const config = parsed['config.json'] as Json
  const generationConfig = await readOptional(dir, 'generation_config.json')
  const family = familyFor(config)
  const pick = (wanted: boolean, graph: string): Promise<string> | undefined => wanted ? graphFile(dir, graph, options.variant) : undefined
  const files: ModelFiles = {
    vision: await pick(options.vision, 'vision_encoder'),
    embed: await pick(options.decoder, 'embed_tokens'),
    decoder: await pick(options.decoder, 'decoder_model_merged')
  }
  const signatures = await graphs(files)
  const source: ModelSource = {
    dir, config, preprocessor: parsed['preprocessor_config.json'] as Json, specialTokens: specialTokens(parsed['tokenizer.json'] as Json, family.vocabulary), vision: signatures.vision
  }
  const { hiddenSize, text } = readTextShape(config, generationConfig, signatures.decoder)
  return {
    ...family.open(source),
    dir,
    name: options.name ?? basename(dir),
    family: family.name,
    config,
    generationConfig,
    source,
    fingerprint: identity.digest('hex'),
    visionIdentity: files.vision === undefined ? undefined : await visionIdentity(files.vision),
    hiddenSize,
    dtype: featureType(signatures.vision, signatures.embed, config),
    files,
    graphs: signatures,
    text
  }
}
