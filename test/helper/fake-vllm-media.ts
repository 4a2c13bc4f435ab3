/** What a fake vLLM makes of a request's pictures: keys, embeddings in a folder that servers share, and the ways they go wrong. */
import { createHash } from 'node:crypto'
import type { ReceivePool } from './fake-mooncake.ts'

/** An embedding, or the picture it would be made of. */
export interface Embedding {
  /** Hash of the picture's bytes: what an answer depends on. */
  readonly content: string
  readonly grid: readonly number[]
}

/** The folder of ECExampleConnector. Nothing ever evicts a file. */
export class SharedFolder {
  readonly files = new Map<string, Embedding & { readonly truncated?: boolean }>()
  /** Keys that would have been written outside the folder. */
  readonly outside: string[] = []
  reads = 0

  write (key: string, embedding: Embedding): void {
    if (/(^|\/)\.\.(\/|$)/.test(key)) this.outside.push(key)
    this.files.set(key, embedding)
  }

  truncate (): void {
    for (const [key, file] of this.files) this.files.set(key, { ...file, truncated: true })
  }

  clear (): void {
    this.files.clear()
  }
}

/** Recorded answers that a request can meet in place of its own. `deadly`: 500, then the process ends. */
export type Trouble = 'deadly' | 'bad-picture' | 'unreachable-picture' | 'local-file' | 'cache-miss' | 'mixed' | 'unknown-metadata' | 'embeds-refused' | 'not-pushed'

export type MediaPart = {
  readonly type: string
  readonly uuid?: string
  readonly image_url?: { readonly url?: string } | string | null
  readonly image_embeds?: Readonly<Record<string, readonly number[]>> | null
}

export interface Keyed extends Embedding { readonly key: string, readonly rewritten: boolean }

const LONGEST_FILE_NAME = 255

export interface MediaRules {
  readonly embeds: boolean
  readonly folder: SharedFolder | undefined
  /** Encoder cache of this process. */
  readonly cache: Map<string, Embedding>
}

/** As an encoder: encodes what its cache lacks and writes it once. */
export async function encodeMedia (parts: readonly MediaPart[], { folder, cache }: MediaRules): Promise<Keyed[] | Trouble> {
  const keyed: Keyed[] = []
  for (const part of parts) {
    const one = await looked(part, cache)
    if (typeof one === 'string') return one
    if (one.key.length > LONGEST_FILE_NAME) return 'deadly'
    const known = cache.get(one.key)
    if (known === undefined) {
      cache.set(one.key, one)
      folder?.write(one.key, one)
    }
    keyed.push({ ...one, ...known })
  }
  return keyed
}

interface TransferParams { readonly ec_items?: ReadonlyArray<{ readonly transfer_id?: string, readonly mm_hash?: string }> }

/** As the consumer of pushed features: it has what has arrived under the names that the request gives, and makes nothing itself. */
export async function receivePushed (parts: readonly MediaPart[], rules: MediaRules, pool: Pick<ReceivePool, 'take'>, { ec_items: items = [] }: TransferParams): Promise<Trouble | undefined> {
  // Refused before anything is taken.
  if (!rules.embeds && parts.some(part => part.type === 'image_embeds')) return undefined
  for (const [i, part] of parts.entries()) {
    const one = part.type === 'image_embeds' ? announced(part) : await looked(part, rules.cache)
    if (typeof one === 'string') return one
    const named = (item: { readonly mm_hash?: string } | undefined): boolean => item !== undefined && (item.mm_hash ?? one.key) === one.key
    const item = named(items[i]) ? items[i] : items.find(named)
    const embedding = item?.transfer_id === undefined ? undefined : pool.take(item.transfer_id)
    if (embedding !== undefined) rules.cache.set(one.key, embedding)
    if (!rules.cache.has(one.key)) return 'not-pushed'
  }
  return undefined
}

/** As a language model: takes embeddings from its cache, then the folder, then its own vision tower. */
export async function consumeMedia (parts: readonly MediaPart[], rules: MediaRules): Promise<Keyed[] | Trouble> {
  const rewritten = parts.filter(part => part.type === 'image_embeds')
  if (rewritten.length > 0 && !rules.embeds) return 'embeds-refused'
  if (rewritten.length > 0 && rewritten.length < parts.length) return 'mixed'
  if (rewritten.some(part => Object.keys(part.image_embeds ?? {}).some(name => name !== 'image_grid_thw'))) return 'unknown-metadata'
  const keyed: Keyed[] = []
  for (const part of parts) {
    const one = part.type === 'image_embeds' ? announced(part) : await looked(part, rules.cache)
    if (typeof one === 'string') return one
    const stored = rules.cache.get(one.key) ?? load(one.key, rules.folder)
    if (stored === 'truncated' || (stored === undefined && one.content === '')) return 'deadly'
    if (stored !== undefined && stored.grid.join() !== one.grid.join()) return 'deadly'
    const embedding = stored ?? one
    rules.cache.set(one.key, embedding)
    keyed.push({ ...one, content: embedding.content })
  }
  return keyed
}

function load (key: string, folder: SharedFolder | undefined): Embedding | 'truncated' | undefined {
  const file = folder?.files.get(key)
  if (file === undefined) return undefined
  if (file.truncated === true) return 'truncated'
  folder!.reads++
  return file
}

/** A part of which only the grid is told; its content is what the key finds. */
function announced (part: MediaPart): Keyed | Trouble {
  const grid = part.image_embeds?.image_grid_thw
  return part.uuid === undefined || grid === undefined ? 'deadly' : { key: part.uuid, content: '', grid, rewritten: true }
}

async function looked (part: MediaPart, cache: ReadonlyMap<string, Embedding>): Promise<Keyed | Trouble> {
  const url = typeof part.image_url === 'string' ? part.image_url : part.image_url?.url
  if (url === undefined) {
    const known = part.uuid === undefined ? undefined : cache.get(part.uuid)
    return known === undefined ? 'cache-miss' : { ...known, key: part.uuid!, rewritten: false }
  }
  if (url.startsWith('file:')) return 'local-file'
  const bytes = await fetched(url)
  if (bytes === undefined) return 'unreachable-picture'
  if (bytes.length < 24 || bytes.toString('latin1', 12, 16) !== 'IHDR') return 'bad-picture'
  const content = createHash('sha256').update(bytes).digest('hex')
  return { key: part.uuid ?? content, content, grid: gridOf(bytes.readUInt32BE(16), bytes.readUInt32BE(20)), rewritten: false }
}

async function fetched (url: string): Promise<Buffer | undefined> {
  const inline = /^data:[^,]*;base64,/.exec(url)
  if (inline !== null) return Buffer.from(url.slice(inline[0].length), 'base64')
  return await fetch(url).then(async answer => Buffer.from(await answer.arrayBuffer()), () => undefined)
}

const PATCH = 14
const MERGED = 28

/** Qwen2-VL's grid, for pictures that need no resizing beyond whole merged patches. */
function gridOf (width: number, height: number): number[] {
  const patches = (side: number): number => Math.max(1, Math.round(side / MERGED)) * MERGED / PATCH
  return [1, patches(height), patches(width)]
}

export function tokensOf ({ grid }: Embedding): number {
  return grid.reduce((product, side) => product * side, 1) / 4
}
