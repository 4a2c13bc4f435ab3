import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Ajv } from 'ajv'
import t from 'tap'
import { packageRoot } from '../helper/package-root.ts'
import { CONFIG_SCHEMA_FILE, configSchema } from '../helper/config-schema.ts'

const text = await readFile(CONFIG_SCHEMA_FILE, 'utf8')

t.test('epd.config.schema.json is the schema of the options; npm run schema writes it', async t => {
  t.equal(text, configSchema())
})

t.test('it takes what a file can hold, in any validator', async t => {
  const fits = new Ajv({ strict: true, strictTypes: false }).compile(JSON.parse(text) as object)
  const docs = await readFile(join(packageRoot(), 'docs', 'options.md'), 'utf8')
  const examples = [...docs.matchAll(/```json\n([^]*?)```/g)].map(([, json]) => JSON.parse(json!) as object)
  t.ok(examples.length > 0)
  for (const example of examples) t.ok(fits(example), JSON.stringify(fits.errors))
  t.ok(fits({ $schema: './node_modules/fastify-epd/epd.config.schema.json', tenant: 'x-customer', telemetry: { traces: { max: 5 } } }))
  for (const wrong of [{ adapters: [] }, { telemetry: { store: {} } }, { tenant: 5 }, { timeouts: { encode: 0 } }, { nodes: [{}] }]) t.notOk(fits(wrong), JSON.stringify(wrong))
})
