export { collectMedia, DEFAULT_MAX_ITEMS, type MediaItem, type MediaSource } from './media-parts.ts'
export type { VisionStats } from './encode-stage.ts'
export { VisionRunner, type EncodedItem, type EncodeRequest, type VisionOptions } from './vision-runner.ts'
