import { dataUrl, makeScene, renderScene, seededRandom, type Scene } from './pictures.ts'

export interface Picture { readonly scene: Scene, readonly url: string }

/** A picture of a random scene as data URL; the same seed draws the same picture. */
export async function drawPicture (seed: number): Promise<Picture> {
  const scene = makeScene(seededRandom(seed))
  return { scene, url: dataUrl(await renderScene(scene)) }
}

export async function drawScene (seed: number): Promise<string> {
  return (await drawPicture(seed)).url
}
