import { randomBytes } from 'node:crypto'

/** A chat with so many pictures of so many bytes, each another. */
export function chatOf (count: number, bytes: number): string {
  const part = (): object => ({ type: 'image_url', image_url: { url: `data:image/jpeg;base64,${randomBytes(bytes).toString('base64')}` } })
  return JSON.stringify({ model: 'm', messages: [{ role: 'user', content: [...Array.from({ length: count }, part), { type: 'text', text: 'What is this?' }] }], max_tokens: 16 })
}
