/** An encoder process started by hand; its features, pulled over the link by this process, are the ONNX graph's own. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import * as ort from 'onnxruntime-node'
import t from 'tap'
import { BlockPool, LeaseTable } from '../../engines/cache/index.ts'
import { shippedModel } from '../../engines/index.ts'
import { featureBlockShape, featureBlocksFor, loadModel } from '../../engines/models/index.ts'
import { P2PNode, type P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { packageRoot } from '../helper/package-root.ts'
import { startCli } from '../helper/cli.ts'
import { metric } from '../helper/metrics.ts'
import { KEYS } from '../p2p/keys.ts'

interface Result { readonly lease: string, readonly epoch: number, readonly num_tokens: number, readonly remote_block_ids: number[] }

const model = await loadModel(shippedModel(), { vision: true, decoder: false })
const picture = await readFile(join(packageRoot(), 'docs', 'examples', 'shapes.png'))
const expected = await direct()
const [ours, theirs] = KEYS

async function direct (): Promise<Buffer> {
  const session = await ort.InferenceSession.create(model.files.vision!, { intraOpNumThreads: 1 })
  const { tensor } = (await model.prepare(picture, {})).inputs[0]!
  const { image_features: features } = await session.run({ pixel_values: new ort.Tensor('float32', tensor.data as Float32Array, tensor.dims) })
  await session.release()
  const data = features!.data as Float32Array
  return Buffer.from(data.buffer, data.byteOffset, data.byteLength)
}

async function post<T> (url: string, body: unknown): Promise<T> {
  const response = await fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) })
  return await response.json() as T
}

for (const [name, transport, curve] of [['ipc', 'ipc', false], ['tcp', 'tcp', false], ['tcp with CURVE', 'tcp', true]] as const) {
  await t.test(`over ${name} they are equal bit for bit, and the ACK ends the lease`, async t => {
    const dir = t.testdir({ public: theirs.publicKey, secret: theirs.secretKey, allowed: ours.publicKey + '\n' })
    const keys = curve ? ['--curve-public-key-file', `${dir}/public`, '--curve-secret-key-file', `${dir}/secret`, '--curve-allowed-keys-file', `${dir}/allowed`] : []
    const { url } = await startCli(t, ['engine', '--role', 'encoder', '--port', '0', '--log-level', 'warn', ...keys])

    const { blockBytes, ...rest } = featureBlockShape(model)
    const pool = new BlockPool({ name: 'feature', numBlocks: 64, blockBytes })
    const leases = new LeaseTable(1)
    const node = await P2PNode.open({
      engineId: 'http://consumer', epoch: 1, leases, fingerprint: model.fingerprint, ipc: transport === 'ipc', pools: { feature: { pool, shape: { block_tokens: rest.blockTokens, hidden_size: rest.hiddenSize, dtype: rest.dtype } } }, ...(curve ? { curve: ours, allowedPeers: [theirs.publicKey] } : {})
    })
    t.teardown(() => node.close())

    const hello = await post<{ kvtransfer_endpoint_info: Array<{ endpoint_info: string }>, engine_endpoint_info: object }>(`${url}/distserve/p2p_initialize`, {
      local_engine_id: url, local_engine_config: {}, remote_engine_id: 'http://consumer', remote_engine_config: {}, protocol: 1
    })
    const connected = post<{ status: number }>(`${url}/distserve/p2p_connect`, {
      protocol: 1, remote_engine_id: 'http://consumer', remote_engine_endpoint_info: hello.engine_endpoint_info, remote_kvtransfer_endpoint_info: [{ protocol: 1, endpoint_info: JSON.stringify(node.endpoint) }]
    })
    await node.connect(JSON.parse(hello.kvtransfer_endpoint_info[0]!.endpoint_info) as P2PEndpointInfo)
    t.equal((await connected).status, 1)

    const encode = async (): Promise<Result> => (await post<{ encoder_result: [Result] }>(`${url}/v1/chat/completions`, {
      model: 'tiny-internvl', messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: `data:image/png;base64,${picture.toString('base64')}` } }] }]
    })).encoder_result[0]
    const figures = async (...names: string[]): Promise<Array<number | undefined>> => {
      const text = await (await fetch(`${url}/metrics`)).text()
      return names.map(name => metric(text, name))
    }
    const result = await encode()
    const localBlocks = pool.allocate(featureBlocksFor(result.num_tokens))!
    const lease = { engineId: url, epoch: result.epoch, lease: result.lease }
    const pulled = await node.pull({ ...lease, pool: 'feature', remoteBlocks: result.remote_block_ids, localBlocks })
    t.equal(pulled.transport, transport)
    const bytes = Buffer.concat(localBlocks.map(id => pool.bytes(id))).subarray(0, expected.length)
    t.ok(bytes.equals(expected), `${expected.length} bytes are the same`)
    await node.ack(lease)
    t.same(await figures('epd_leases_open', 'epd_acks_total', 'epd_encoded_items_total', 'epd_encoder_cache_hits_total'), [0, 1, 1, 0])

    const again = await encode()
    t.same(await figures('epd_leases_open', 'epd_encoded_items_total', 'epd_encoder_cache_hits_total'), [1, 1, 1], 'the second time nothing is encoded, though the first lease was ACKed')
    await node.pull({ ...lease, lease: again.lease, pool: 'feature', remoteBlocks: again.remote_block_ids, localBlocks })
    t.ok(Buffer.concat(localBlocks.map(id => pool.bytes(id))).subarray(0, expected.length).equals(expected), 'and the features are the same')
    await node.ack({ ...lease, lease: again.lease })
    pool.release(localBlocks)
  })
}
