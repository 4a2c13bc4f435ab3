import type { Modality } from '../../adapters/adapter.ts'
import { CONTROL_FIELDS as OURS, TENANT_FIELD } from '../../adapters/wire/results.ts'

/**
 * Members by which a gateway tells an engine what to pull from whom, and for whom. No client may send them: an engine
 * would read other people's memory blocks, or hang, or die (InternLM/lmdeploy#4965), or tell what is in their caches.
 */
export const CONTROL_FIELDS: readonly string[] = [
  ...OURS, TENANT_FIELD, 'ec_transfer_params', 'kv_transfer_params'
]

/** Members whose own members some engine merges with control fields (vLLM's `extra_args`). */
export const GUARDED_MEMBERS: readonly string[] = ['vllm_xargs']

/** Content part types that carry media: by which member, and what it is. */
export const MEDIA_TYPES: ReadonlyMap<string, Modality> = new Map<string, Modality>([
  ['image_url', 'image'],
  ['image_data', 'image'],
  ['image', 'image'],
  ['video_url', 'video'],
  ['video', 'video'],
  ['audio_url', 'audio'],
  ['audio', 'audio'],
  ['input_audio', 'audio']
])

/** Messages of other roles pass through as they are: engines look for media in these alone. */
export const MEDIA_ROLES: ReadonlySet<string> = new Set(['user', 'tool', 'system'])
