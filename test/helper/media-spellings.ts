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
const inList = (role: string): Wrap => content => ({ role, content })
const CHAT_ROLES = ['system', 'developer', 'user', 'assistant', 'tool', 'function', 'robot']
/** Each route's messages around a list of parts. */
export const PLACES: Record<string, { list: 'messages' | 'input', wrap: Wrap }> = {
  ...Object.fromEntries(CHAT_ROLES.map(role => [`chat, ${role}`, { list: 'messages' as const, wrap: inList(role) }])),
  'chat, no role': { list: 'messages', wrap: content => ({ content }) },
  'messages, a tool\'s result': { list: 'messages', wrap: parts => ({ role: 'user', content: [{ type: 'tool_result', tool_use_id: 't', content: parts }] }) },
  'messages, a result in a result': { list: 'messages', wrap: parts => ({ role: 'user', content: [{ content: [{ type: 'tool_result', content: parts }], type: 'tool_result' }] }) },
  'responses, a message': { list: 'input', wrap: content => ({ type: 'message', role: 'user', content }) },
  'responses, a function\'s output': { list: 'input', wrap: output => ({ type: 'function_call_output', call_id: 'c', output }) }
}
