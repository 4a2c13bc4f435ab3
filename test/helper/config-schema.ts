/**
 * The part of the options' schema that a JSON file can hold, for editors. `npm run schema` writes it to
 * epd.config.schema.json; a test compares the two.
 */
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { packageRoot } from './package-root.ts'
import { optionsSchema } from '../../plugin/options/index.ts'

export const CONFIG_SCHEMA_FILE = join(packageRoot(), 'epd.config.schema.json')

export function configSchema (): string {
  const { $id: _, ...schema } = optionsSchema
  const head = { $schema: 'http://json-schema.org/draft-07/schema#', title: 'Configuration of fastify-epd' }
  return JSON.stringify({ ...head, ...schema }, (key, value) => key === 'expects' || inCode(value) ? undefined : Array.isArray(value) ? value.filter(one => !inCode(one)) : value, 2) + '\n'
}

function inCode (value: unknown): boolean {
  return typeof value === 'object' && value !== null && ('inCode' in value || 'isFunction' in value)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) writeFileSync(CONFIG_SCHEMA_FILE, configSchema())
