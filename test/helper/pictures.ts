/**
 * Draws test pictures: shapes on a plain background as SVG, rasterised and compressed by sharp. Says what is in them,
 * and asks questions with known answers. Written from the specification in docs/models.md alone: it shares nothing
 * with the generator the model was trained on.
 */
import { requireOptional } from '../../engines/service/optional.ts'
import { mulberry32 } from './random.ts'

export const SHAPES = ['circle', 'square', 'triangle', 'star', 'cross'] as const
export const COLOURS = ['red', 'green', 'blue', 'yellow', 'purple', 'orange', 'white', 'black'] as const
export const FORMATS = ['png', 'jpeg', 'webp'] as const
export type ShapeName = typeof SHAPES[number]
export type ColourName = typeof COLOURS[number]
export type PictureFormat = typeof FORMATS[number]

/** Uniform in [0, 1). */
export type Random = () => number

export interface Thing {
  readonly shape: ShapeName
  readonly colour: ColourName
  /** `#rrggbb` */
  readonly fill: string
  /** Centre and size, pixels. */
  readonly x: number
  readonly y: number
  readonly across: number
  /** Degrees clockwise. */
  readonly turn: number
  /** Radius of a star's notches over that of its tips; half the width of a cross's arms over half its length. */
  readonly waist: number
}

export interface Scene {
  readonly width: number
  readonly height: number
  readonly background: string
  readonly antialias: boolean
  readonly things: readonly Thing[]
}

export const KINDS = ['count', 'total', 'colour', 'shape', 'existence', 'position', 'describe'] as const
export type Kind = typeof KINDS[number] | 'several'

export interface Question {
  readonly kind: Kind
  readonly text: string
  readonly answer: string
}

const FILLS: Record<ColourName, readonly string[]> = {
  red: ['#ff0000', '#e53935', '#d62728', '#dc143c', '#c62828'],
  green: ['#008000', '#43a047', '#2ca02c', '#00b050', '#228b22'],
  blue: ['#0000ff', '#1e50e6', '#2962ff', '#1f77b4', '#304ffe'],
  yellow: ['#ffff00', '#fdd835', '#ffeb3b', '#ffd500', '#f0e010'],
  purple: ['#800080', '#8e24aa', '#7b1fa2', '#9467bd', '#6a1b9a'],
  orange: ['#ffa500', '#fb8c00', '#ff7f0e', '#f57c00', '#ff9800'],
  white: ['#ffffff', '#fafafa', '#f5f5f5'],
  black: ['#000000', '#111111', '#1a1a1a']
}
/** Least distance of a thing's colour from the background's, in RGB. */
const LEAST_CONTRAST = 90
/** Positions are asked only when the centre is this far from the lines between the nine fields, of the picture's side. */
const CLEAR_OF_LINES = 0.02

/** A repeatable source of random numbers from 0 to below 1. */
export function seededRandom (seed: number): Random {
  const next = mulberry32(seed)
  return () => next() / 2 ** 32
}

export function pick<T> (random: Random, list: readonly T[]): T {
  return list[Math.floor(random() * list.length)] as T
}

function between (random: Random, low: number, high: number): number {
  return low + random() * (high - low)
}

function whole (random: Random, low: number, high: number): number {
  return Math.floor(between(random, low, high + 1))
}

function rgb (fill: string): [number, number, number] {
  return [1, 3, 5].map(at => parseInt(fill.slice(at, at + 2), 16)) as [number, number, number]
}

function contrast (a: string, b: string): number {
  const [x, y] = [rgb(a), rgb(b)]
  return Math.hypot(x[0] - y[0], x[1] - y[1], x[2] - y[2])
}

/** Corners about the centre; a circle has none. */
function corners (thing: Thing): Array<[number, number]> {
  const half = thing.across / 2
  const ring = (count: number, radius: (i: number) => number, start: number): Array<[number, number]> =>
    Array.from({ length: count }, (_, i) => {
      const angle = (start + i * 360 / count + thing.turn) * Math.PI / 180
      return [Math.cos(angle) * radius(i), Math.sin(angle) * radius(i)]
    })
  switch (thing.shape) {
    case 'circle': return []
    case 'square': return ring(4, () => half * 1.25, 45)
    case 'triangle': return ring(3, () => half * 1.1, -90)
    case 'star': return ring(10, i => i % 2 === 0 ? half * 1.03 : half * thing.waist, -90)
    case 'cross': {
      const w = thing.waist * half
      const plain: Array<[number, number]> = [
        [-w, -half], [w, -half], [w, -w], [half, -w], [half, w], [w, w], [w, half], [-w, half], [-w, w], [-half, w], [-half, -w], [-w, -w]
      ]
      const angle = thing.turn * Math.PI / 180
      return plain.map(([x, y]) => [x * Math.cos(angle) - y * Math.sin(angle), x * Math.sin(angle) + y * Math.cos(angle)])
    }
  }
}

/** Radius of the circle about its centre that a thing stays in. */
function reach (thing: Thing): number {
  return Math.max(thing.shape === 'circle' ? thing.across / 2 : 0, ...corners(thing).map(([x, y]) => Math.hypot(x, y)))
}

export interface SceneOptions {
  /** How many things; 1 to 6 by default. */
  readonly count?: number
  /** Longest side, pixels; 1024 by default. */
  readonly longest?: number
}

function placeThing (random: Random, scene: Omit<Scene, 'things'>, things: readonly Thing[], colour: ColourName, shape: ShapeName): Thing | undefined {
  const fills = FILLS[colour].filter(fill => contrast(fill, scene.background) >= LEAST_CONTRAST)
  if (fills.length === 0) return undefined
  const { width, height } = scene
  const short = Math.min(width, height)
  const turned = shape !== 'circle' && shape !== 'star' && random() < 0.5
  const style = { shape, colour, fill: pick(random, fills), turn: turned ? between(random, 0, 360) : 0, waist: shape === 'star' ? between(random, 0.38, 0.5) : between(random, 0.27, 0.38) }
  for (let attempt = 0; attempt < 60; attempt++) {
    const across = between(random, 1 / 7, attempt < 30 ? 1 / 3 : 1 / 6) * short
    const thing: Thing = { ...style, across, x: between(random, 0, width), y: between(random, 0, height) }
    const r = reach(thing)
    if (thing.x < r + 1 || thing.y < r + 1 || thing.x > width - r - 1 || thing.y > height - r - 1) continue
    if (things.every(other => Math.hypot(thing.x - other.x, thing.y - other.y) >= r + reach(other) + 0.02 * short)) return thing
  }
  return undefined
}

export function makeScene (random: Random, options: SceneOptions = {}): Scene {
  let width: number
  let height: number
  do {
    width = whole(random, 128, options.longest ?? 1024)
    height = whole(random, 128, options.longest ?? 1024)
  } while (width > 2 * height || height > 2 * width)
  const level = random() < 0.2 ? 255 : random() < 0.12 ? 0 : whole(random, 0, 255)
  const background = '#' + level.toString(16).padStart(2, '0').repeat(3)
  const empty = { width, height, background, antialias: random() < 0.75 }
  const count = options.count ?? whole(random, 1, 6)
  const things: Thing[] = []
  // Half of the pictures repeat a few kinds of things, so that there is something to count.
  const palette = random() < 0.5
    ? undefined
    : Array.from({ length: whole(random, 1, 3) }, () => [pick(random, COLOURS), pick(random, SHAPES)] as const)
  for (let attempt = 0; things.length < count && attempt < 40; attempt++) {
    const [colour, shape] = palette !== undefined && attempt < 20 ? pick(random, palette) : [pick(random, COLOURS), pick(random, SHAPES)]
    const thing = placeThing(random, empty, things, colour, shape)
    if (thing !== undefined) things.push(thing)
  }
  return things.length === count || (options.count === undefined && things.length > 0) ? { ...empty, things } : makeScene(random, options)
}

/** The same picture with one thing changed in colour, in shape, or in both. */
export function changeOne (random: Random, scene: Scene): { readonly scene: Scene, readonly before: Thing, readonly after: Thing } {
  for (;;) {
    const at = whole(random, 0, scene.things.length - 1)
    const before = scene.things[at] as Thing
    const what = whole(random, 0, 2)
    const colour = what === 0 ? before.colour : pick(random, COLOURS)
    const shape = what === 1 ? before.shape : pick(random, SHAPES)
    const fill = colour === before.colour ? before.fill : FILLS[colour].find(f => contrast(f, scene.background) >= LEAST_CONTRAST)
    if (fill === undefined || (colour === before.colour && shape === before.shape)) continue
    const waist = shape === 'star' ? 0.42 : 0.33
    const after: Thing = { ...before, colour, shape, fill, waist, turn: shape === 'star' ? 0 : before.turn }
    return { scene: { ...scene, things: scene.things.map((thing, i) => i === at ? after : thing) }, before, after }
  }
}

export function sceneSvg (scene: Scene): string {
  const bodies = scene.things.map(thing => thing.shape === 'circle'
    ? `<circle cx="${thing.x.toFixed(2)}" cy="${thing.y.toFixed(2)}" r="${(thing.across / 2).toFixed(2)}" fill="${thing.fill}"/>`
    : `<polygon points="${corners(thing).map(([x, y]) => `${(thing.x + x).toFixed(2)},${(thing.y + y).toFixed(2)}`).join(' ')}" fill="${thing.fill}"/>`)
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${scene.width}" height="${scene.height}" shape-rendering="${scene.antialias ? 'geometricPrecision' : 'crispEdges'}">` +
    `<rect width="100%" height="100%" fill="${scene.background}"/>${bodies.join('')}</svg>`
}

/** Quality is for JPEG and WebP; 70 is the least the model is made for. */
export async function renderScene (scene: Scene, format: PictureFormat = 'png', quality = 85): Promise<Buffer> {
  const picture = requireOptional('sharp')(Buffer.from(sceneSvg(scene))).flatten({ background: scene.background })
  switch (format) {
    case 'png': return await picture.png({ compressionLevel: 2 }).toBuffer()
    case 'jpeg': return await picture.jpeg({ quality }).toBuffer()
    case 'webp': return await picture.webp({ quality, effort: 0 }).toBuffer()
  }
}

export function dataUrl (bytes: Uint8Array, format: PictureFormat = 'png'): string {
  return `data:image/${format};base64,${Buffer.from(bytes).toString('base64')}`
}

/* Answers */

interface What { readonly colour?: ColourName | undefined, readonly shape?: ShapeName | undefined }

export function countOf (scene: Scene, what: What): number {
  return scene.things.filter(thing => (what.colour ?? thing.colour) === thing.colour && (what.shape ?? thing.shape) === thing.shape).length
}

function plural (shape: string, count: number): string {
  return count === 1 ? shape : shape === 'cross' ? 'crosses' : `${shape}s`
}

/** The most numerous first, then by the alphabet. */
export function describeScene (scene: Scene): string {
  const counts = new Map<string, number>()
  for (const { colour, shape } of scene.things) counts.set(`${colour} ${shape}`, (counts.get(`${colour} ${shape}`) ?? 0) + 1)
  const parts = [...counts]
    .sort(([a, n], [b, m]) => m - n || (a < b ? -1 : 1))
    .map(([name, n]) => {
      const [colour, shape] = name.split(' ') as [string, string]
      return `${n} ${colour} ${plural(shape, n)}`
    })
  const last = parts.pop() as string
  return (parts.length === 0 ? last : `${parts.join(', ')} and ${last}`) + '.'
}

export function placeOf (scene: Scene, thing: Thing): string {
  const column = Math.floor(thing.x / scene.width * 3)
  const row = Math.floor(thing.y / scene.height * 3)
  const across = ['left', '', 'right'][column] as string
  const down = ['top', '', 'bottom'][row] as string
  return `${down} ${across}`.trim() || 'centre'
}

function clearOfLines (scene: Scene, thing: Thing): boolean {
  return [thing.x / scene.width, thing.y / scene.height].every(v => [1 / 3, 2 / 3].every(line => Math.abs(v - line) >= CLEAR_OF_LINES))
}

/* Questions */

function nameOf (what: What, many: boolean): string {
  const noun = what.shape === undefined ? (many ? 'shapes' : 'shape') : plural(what.shape, many ? 2 : 1)
  return what.colour === undefined ? noun : `${what.colour} ${noun}`
}

function withArticle (name: string): string {
  return (/^[aeiou]/.test(name) ? 'an ' : 'a ') + name
}

/** What people do to a question without changing it: article, spelling, capitals, question mark. */
function say (random: Random, forms: readonly string[], name = '', many = ''): string {
  const bare = random() < 0.2
  const text = pick(random, forms)
    .replaceAll('{a}', bare ? name : withArticle(name))
    .replaceAll('{the}', bare ? name : `the ${name}`)
    .replaceAll('{many}', many)
    .replaceAll('{name}', name)
    .replaceAll('{colour}', random() < 0.5 ? 'colour' : 'color')
    .replaceAll('{picture}', random() < 0.75 ? 'picture' : 'image')
  const style = random()
  return style < 0.1 ? text.toLowerCase() : style < 0.2 ? text.replace(/[?.]$/, '') : text
}

const FORMS = {
  count: ['How many {many} are there?', 'How many {many} are in the {picture}?', 'How many {many} do you see?', 'Count the {many}.', 'How many {many} are there in this {picture}?'],
  colour: ['What {colour} is {the}?', 'Which {colour} is {the}?', 'What is the {colour} of {the}?', 'What {colour} is {the} in the {picture}?'],
  shape: ['What shape is {name}?', 'Which shape is {name}?', 'What shape is the {name} object?', 'What is the shape of the {name} object?'],
  existence: ['Is there {a}?', 'Is there {a} in the {picture}?', 'Do you see {a}?', 'Are there any {many}?', 'Can you see {a}?'],
  position: ['Where is {the}?', 'Where is {the} in the {picture}?', 'In which part of the {picture} is {the}?', 'What is the position of {the}?'],
  describe: ['Describe the {picture}.', 'Describe this {picture}.', 'What is in the {picture}?', 'What do you see?', 'What can you see in this {picture}?'],
  most: ['Which {picture} has the most {many}?', 'Which {picture} shows the most {many}?', 'In which {picture} are the most {many}?'],
  sum: ['How many {many} are there in all {picture}s?', 'How many {many} are in all {picture}s?', 'How many {many} are there in total?', 'How many {many} are there in all the {picture}s?'],
  which: ['Which {picture} has {a}?', 'Which {picture} shows {a}?', 'In which {picture} is there {a}?', 'Which {picture} contains {a}?']
}

/** One question of every kind the picture allows. */
export function questionsFor (scene: Scene, random: Random): Question[] {
  const questions: Question[] = []
  const add = (kind: Kind, text: string, answer: string): void => { questions.push({ kind, text, answer }) }
  const some = pick(random, scene.things)
  const other = { colour: pick(random, COLOURS), shape: pick(random, SHAPES) }
  const aim = random()
  const what: What = aim < 0.5 ? { colour: some.colour, shape: some.shape } : aim < 0.65 ? { shape: some.shape } : aim < 0.8 ? { colour: some.colour } : aim < 0.9 ? { ...other, shape: some.shape } : other
  add('count', say(random, FORMS.count, '', nameOf(what, true)), String(countOf(scene, what)))
  add('total', say(random, FORMS.count, '', 'shapes'), String(scene.things.length))
  const onlyShapes = scene.things.filter(({ shape }) => countOf(scene, { shape }) === 1)
  if (onlyShapes.length > 0) {
    const thing = pick(random, onlyShapes)
    add('colour', say(random, FORMS.colour, thing.shape), thing.colour)
  }
  const onlyColours = scene.things.filter(({ colour }) => countOf(scene, { colour }) === 1)
  if (onlyColours.length > 0) {
    const thing = pick(random, onlyColours)
    add('shape', say(random, FORMS.shape, thing.colour), thing.shape)
  }
  const asked: What = random() < 0.5 ? { colour: some.colour, shape: some.shape } : random() < 0.5 ? { colour: some.colour, shape: other.shape } : { colour: other.colour, shape: some.shape }
  add('existence', say(random, FORMS.existence, nameOf(asked, false), nameOf(asked, true)), countOf(scene, asked) > 0 ? 'yes' : 'no')
  const only = scene.things.filter(thing => countOf(scene, thing) === 1 && clearOfLines(scene, thing))
  if (only.length > 0) {
    const thing = pick(random, only)
    add('position', say(random, FORMS.position, nameOf(thing, false)), placeOf(scene, thing))
  }
  add('describe', say(random, FORMS.describe), describeScene(scene))
  return questions
}

const ORDINALS = ['first', 'second', 'third', 'fourth']

/** Up to three questions about two to four pictures: the most, the sum, and which. */
export function questionsForSeveral (scenes: readonly Scene[], random: Random): Question[] {
  const questions: Question[] = []
  const add = (text: string, answer: string): void => { questions.push({ kind: 'several', text, answer }) }
  const counts = scenes.map(scene => scene.things.length)
  const best = Math.max(...counts)
  if (counts.filter(n => n === best).length === 1) add(say(random, FORMS.most, '', 'shapes'), `the ${ORDINALS[counts.indexOf(best)]}`)
  const some = pick(random, pick(random, scenes).things)
  const what: What = random() < 0.6 ? { colour: some.colour, shape: some.shape } : { shape: some.shape }
  add(say(random, FORMS.sum, '', nameOf(what, true)), String(scenes.reduce((n, scene) => n + countOf(scene, what), 0)))
  const candidates = scenes.flatMap((scene, i) => scene.things.flatMap<[What, number]>(({ colour, shape }) => [[{ shape }, i], [{ colour, shape }, i]]))
    .filter(([w, i]) => scenes.every((scene, j) => j === i || countOf(scene, w) === 0))
  if (candidates.length > 0) {
    const [w, i] = pick(random, candidates)
    add(say(random, FORMS.which, nameOf(w, false)), `the ${ORDINALS[i]}`)
  }
  return questions
}
