/** Every spelling of a media part that servers take, and every place where one may stand. */
export const PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
export const PICTURE = `data:image/png;base64,${PNG}`

/** Parts with one item each. */
export const ONE: Record<string, object> = {
  image_url: { type: 'image_url', image_url: { url: PICTURE, detail: 'low' } },
  'image_url as a string': { type: 'image_url', image_url: PICTURE },
  'image_url with url beside': { type: 'image_url', url: PICTURE },
  'the type last': { image_url: { url: PICTURE }, type: 'image_url' },
  'no type': { image_url: { url: PICTURE } },
  'no type, image': { image: PICTURE },
  'the type null': { type: null, image_url: { url: PICTURE } },
  'image_url with a uuid': { type: 'image_url', image_url: { url: PICTURE }, uuid: 'a' },
  'null with a uuid': { type: 'image_url', image_url: null, uuid: 'a' },
  'empty with a uuid': { type: 'image_url', image_url: {}, uuid: 'a' },
  'no type, null with a uuid': { image_url: null, uuid: 'a' },
  'text with a uuid and image_url': { type: 'text', text: '', image_url: PICTURE, uuid: 'a' },
  image: { type: 'image', image: PICTURE },
  'image, base64 alone': { type: 'image', image: PNG },
  'image with url': { type: 'image', url: PICTURE },
  'image with data': { type: 'image', data: PNG, mimeType: 'image/png' },
  'image with image_url': { type: 'image', image_url: { url: PICTURE } },
  'image with source, base64': { type: 'image', source: { type: 'base64', media_type: 'image/png', data: PNG }, cache_control: { type: 'ephemeral' } },
  'image with source, url': { type: 'image', source: { type: 'url', url: 'https://example.com/a.png' } },
  'image with source, file': { type: 'image', source: { type: 'file', file_id: 'file-1' } },
  image_data: { type: 'image_data', image_data: { data: PNG } },
  'url and data': { type: 'image_url', image_url: { data: PNG, url: PICTURE } },
  'data, and url null': { type: 'image_data', image_data: { url: null, data: PNG } },
  input_image: { type: 'input_image', image_url: PICTURE, detail: 'auto' },
  'input_image with an object': { type: 'input_image', image_url: { url: PICTURE } },
  'input_image with a file': { type: 'input_image', file_id: 'file-1' },
  image_embeds: { type: 'image_embeds', image_embeds: PNG },
  'image_embeds as an object': { type: 'image_embeds', image_embeds: { image_grid_thw: [1, 2, 2] }, uuid: 'a' },
  'no type, image_embeds as a list': { image_embeds: [PNG] },
  image_pil: { type: 'image_pil', image_pil: null, uuid: 'a' },
  video_url: { type: 'video_url', video_url: { url: 'https://example.com/a.mp4' } },
  video: { type: 'video', video: 'https://example.com/a.mp4' },
  video_embeds: { type: 'video_embeds', video_embeds: PNG },
  audio_url: { type: 'audio_url', audio_url: { url: 'https://example.com/a.wav' } },
  'no type, audio_url': { audio_url: 'https://example.com/a.wav' },
  audio: { type: 'audio', audio: 'https://example.com/a.wav' },
  input_audio: { type: 'input_audio', input_audio: { data: PNG, format: 'wav' } },
  audio_embeds: { type: 'audio_embeds', audio_embeds: PNG },
  'no URL at all': { type: 'image_url' },
  'a number for a URL': { type: 'image_url', image_url: 7 }
}
/** Parts without any. */
export const NONE: Record<string, unknown> = {
  text: { type: 'text', text: PICTURE },
  'a string': PICTURE,
  input_text: { type: 'input_text', text: 'x' },
  'text with image_url': { type: 'text', text: 'x', image_url: PICTURE },
  'no type, null': { image_url: null },
  'a number for a type': { type: 7, image_url: PICTURE },
  tool_use: { type: 'tool_use', id: 'a', name: 'f', input: { type: 'image', source: { data: PNG }, content: [{ type: 'image', image: PICTURE }] } },
  'a list': [{ type: 'image_url', image_url: PICTURE }],
  null: null
}

export type Wrap = (parts: unknown[]) => unknown
export interface Place {
  /** The top-level member. */
  readonly member: string
  /** Its value around a list of parts. */
  readonly wrap: Wrap
  readonly routes: readonly string[]
}
const CHATS = ['/v1/chat/completions', '/v1/messages']
const RESPONSES = ['/v1/responses']
const CHAT_ROLES = ['system', 'developer', 'user', 'assistant', 'tool', 'function', 'robot']
const chat = (wrap: Wrap): Place => ({ member: 'messages', wrap: parts => [wrap(parts)], routes: CHATS })
const result: Wrap = content => ({ type: 'tool_result', tool_use_id: 't', content })
const document: Wrap = content => ({ type: 'document', title: 'x', source: { type: 'content', content } })

/** Places of which an encoder gets the media: each route's messages around a list of parts. */
export const PLACES: Record<string, Place> = {
  ...Object.fromEntries(CHAT_ROLES.map(role => [`chat, ${role}`, chat(content => ({ role, content }))])),
  'chat, no role': chat(content => ({ content })),
  'chat, one message alone': { member: 'messages', wrap: content => ({ role: 'user', content }), routes: CHATS },
  'messages, a tool\'s result': chat(parts => ({ role: 'user', content: [result(parts)] })),
  'messages, a result in a result': chat(parts => ({ role: 'user', content: [{ content: [{ type: 'tool_result', content: parts }], type: 'tool_result' }] })),
  'messages, a document': chat(parts => ({ role: 'user', content: [document(parts)] })),
  'messages, a document in a result': chat(parts => ({ role: 'user', content: [result([document(parts)])] })),
  'responses, a message': { member: 'input', wrap: content => [{ type: 'message', role: 'user', content }], routes: RESPONSES },
  'responses, one message alone': { member: 'input', wrap: content => ({ content, role: 'user' }), routes: RESPONSES },
  'responses, a function\'s output': { member: 'input', wrap: output => [{ type: 'function_call_output', call_id: 'c', output }], routes: RESPONSES }
}

/** Places of which only a model that sees knows what to do with the media. */
export const APART_PLACES: Record<string, Place> = {
  'rerank, a document': { member: 'documents', wrap: content => ['text', { content }], routes: ['/v1/rerank'] },
  'rerank, all documents in one': { member: 'documents', wrap: content => ({ content }), routes: ['/v1/rerank'] },
  'rerank, the query': { member: 'query', wrap: content => ({ content }), routes: ['/v1/rerank'] },
  'score, text_1': { member: 'text_1', wrap: content => ({ content }), routes: ['/v1/score'] },
  'score, text_2': { member: 'text_2', wrap: content => [{ content }], routes: ['/v1/score'] },
  'score, queries': { member: 'queries', wrap: content => [{ content }], routes: ['/v1/score'] },
  'score, items': { member: 'items', wrap: parts => parts, routes: ['/v1/score'] },
  'score, data_1': { member: 'data_1', wrap: content => ({ content }), routes: ['/v1/score'] },
  'score, data_2': { member: 'data_2', wrap: parts => parts, routes: ['/v1/score'] },
  'embeddings, a part for an input': { member: 'input', wrap: parts => parts, routes: ['/v1/embeddings'] },
  'embeddings, one part alone': { member: 'input', wrap: parts => Array.isArray(parts.at(-1)) ? parts : parts.at(-1) ?? null, routes: ['/v1/embeddings'] },
  'embeddings, messages for inputs': { member: 'inputs', wrap: content => [{ content }], routes: ['/v1/embeddings'] },
  'messages, the system prompt': { member: 'system', wrap: parts => parts, routes: ['/v1/messages'] },
  'messages, a document in the system prompt': { member: 'system', wrap: parts => [document(parts)], routes: ['/v1/messages'] }
}

/** Media that stand alone in a top-level member, with so many items. */
export const LOOSE_MEDIA: Array<readonly [items: number, body: Record<string, unknown>]> = [
  [1, { image_data: PICTURE }], [1, { image_data: PNG }], [2, { image_data: [PICTURE, PNG] }], [1, { image_data: [{ data: PNG, id: 12 }] }], [1, { image_data: { url: PICTURE } }],
  [3, { image_data: [[PICTURE], [PNG, { url: PICTURE }]] }], [1, { image_data: [null, { id: 7 }] }], [1, { image_data: [{ type: 'text', data: PNG }] }],
  [1, { video_data: 'https://example.com/a.mp4' }], [1, { audio_data: ['https://example.com/a.wav'] }],
  [0, { image_data: null }], [0, { image_data: [] }], [0, { image_data: [[]] }], [0, { image_data: 7 }], [0, { data: PNG, url: PICTURE }]
]
