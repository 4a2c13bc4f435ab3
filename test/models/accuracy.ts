/**
 * Measures the shipped model on freshly drawn pictures and prints the table of docs/models.md:
 *
 *     npm run build && node dist/test/models/accuracy.js [pictures] [seed]
 */
import { pathToFileURL } from 'node:url'
import { FORMATS, KINDS, makeScene, pick, questionsFor, questionsForSeveral, renderScene, seededRandom, type Kind, type PictureFormat, type Scene } from '../helper/pictures.ts'
import { openTinyModel, type Seen, type TinyModel } from '../helper/tiny-model.ts'

export interface Tally { asked: number, right: number }
/** By kind, and within it by file format; pictures of several formats count as `mixed`. */
export type Accuracy = Map<Kind, Map<PictureFormat | 'mixed', Tally>>

export interface Miss { readonly kind: Kind, readonly format: string, readonly text: string, readonly answer: string, readonly said: string, readonly picture: number }

export function rate (tallies: Iterable<Tally>): Tally {
  const sum = { asked: 0, right: 0 }
  for (const { asked, right } of tallies) {
    sum.asked += asked
    sum.right += right
  }
  return sum
}

export async function measure (tiny: TinyModel, pictures: number, seed: number): Promise<{ accuracy: Accuracy, misses: Miss[] }> {
  const random = seededRandom(seed)
  const accuracy: Accuracy = new Map([...KINDS, 'several' as const].map(kind => [kind, new Map()]))
  const misses: Miss[] = []
  let number = 0
  const ask = async (questions: ReturnType<typeof questionsFor>, seen: readonly Seen[], format: PictureFormat | 'mixed') => {
    for (const { kind, text, answer } of questions) {
      const said = await tiny.ask(text, seen, random() < 0.5)
      const formats = accuracy.get(kind) as Map<PictureFormat | 'mixed', Tally>
      const tally = formats.get(format) ?? { asked: 0, right: 0 }
      formats.set(format, tally)
      tally.asked++
      if (said === answer) tally.right++
      else misses.push({ kind, format, text, answer, said, picture: number })
    }
  }
  let group: Array<{ scene: Scene, seen: Seen }> = []
  let groupSize = 2
  for (; number < pictures; number++) {
    const scene = makeScene(random)
    const format = FORMATS[number % FORMATS.length] as PictureFormat
    const quality = 70 + Math.floor(random() * 31)
    const seen = await tiny.see(await renderScene(scene, format, quality))
    await ask(questionsFor(scene, random), [seen], format)
    group.push({ scene, seen })
    if (group.length === groupSize) {
      await ask(questionsForSeveral(group.map(g => g.scene), random), group.map(g => g.seen), 'mixed')
      group = []
      groupSize = pick(random, [2, 3, 4])
    }
  }
  return { accuracy, misses }
}

function cell (tally: Tally | undefined): string {
  return tally === undefined ? '' : `${(tally.right / tally.asked * 100).toFixed(1)} % (${tally.right}/${tally.asked})`
}

export function table (accuracy: Accuracy): string {
  const rows = [...accuracy].map(([kind, formats]) => [kind, ...FORMATS.map(f => cell(formats.get(f))), cell(rate(formats.values()))])
  return [['kind', 'PNG', 'JPEG', 'WebP', 'all'], Array<string>(5).fill('---'), ...rows].map(row => `| ${row.join(' | ')} |`).join('\n')
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const pictures = Number(process.argv[2] ?? 1000)
  const seed = Number(process.argv[3] ?? Date.now() % 1_000_000)
  const tiny = await openTinyModel()
  const start = process.hrtime.bigint()
  const { accuracy, misses } = await measure(tiny, pictures, seed)
  console.log(`${pictures} pictures, seed ${seed}, ${Number(process.hrtime.bigint() - start) / 1e9 | 0} s\n`)
  console.log(table(accuracy))
  for (const miss of misses) console.log(JSON.stringify(miss))
  await tiny.close()
}
