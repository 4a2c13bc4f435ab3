"""Writes the model folder: configurations and the three ONNX graphs, and checks them against transformers.

    python export.py MODEL_DIR CHECKPOINT    export
    python export.py MODEL_DIR --random      export random weights: the right layout, for tests of an engine
    python export.py MODEL_DIR               check the folder as it stands

The graphs are written operator by operator, so that a decode step runs few of them. Weights are stored as
float16 and cast to float32 in the graph (ONNX Runtime folds the casts when it loads the file).
"""
import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import model as m

OPSET = 20
NEGATIVE = -1e9


class Graph:
    def __init__(self, name):
        self.name, self.nodes, self.initializers, self.inputs, self.outputs = name, [], [], [], []
        self.known = {}

    def op (self, kind, *inputs, outputs=1, name=None, **attributes):
        stem = name or f'{kind.lower()}_{len(self.nodes)}'
        names = outputs if isinstance(outputs, list) else [stem] if outputs == 1 else [f'{stem}.{i}' for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f'{stem}/{kind}', **attributes))
        return names[0] if len(names) == 1 else names

    def const (self, value, dtype=np.int64):
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = f'const_{len(self.known)}'
            self.initializers.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]

    def weight (self, name, tensor):
        half = tensor.detach().to(torch.float16).numpy()
        self.initializers.append(numpy_helper.from_array(half, name + '.fp16'))
        return self.op('Cast', name + '.fp16', to=TensorProto.FLOAT, name=name)

    def input (self, name, dtype, shape):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output (self, name, dtype, shape):
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def linear (self, x, name, weight, bias=None, out=None):
        y = self.op('MatMul', x, self.weight(name + '.weight', weight.t().contiguous()), name=None if bias is not None else out)
        return y if bias is None else self.op('Add', y, self.weight(name + '.bias', bias), name=out)

    def layer_norm (self, x, name, norm):
        return self.op('LayerNormalization', x, self.weight(name + '.weight', norm.weight), self.weight(name + '.bias', norm.bias), axis=-1, epsilon=norm.eps)

    def rms_norm (self, x, name, norm):
        square = self.op('Pow', x, self.const(2, np.float32))
        mean = self.op('ReduceMean', square, self.const([-1]), keepdims=1)
        root = self.op('Sqrt', self.op('Add', mean, self.const(norm.eps, np.float32)))
        return self.op('Mul', self.op('Div', x, root), self.weight(name + '.weight', norm.weight))

    def save (self, path):
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], producer_name='fastify-epd')
        proto.ir_version = 9
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, str(path))


def vision_graph (net):
    g, tower, h = Graph('vision_encoder'), net.model.vision_tower, m.HIDDEN
    heads = m.VISION['heads']
    x = g.input('pixel_values', TensorProto.FLOAT, ['tiles', 3, m.TILE, m.TILE])
    emb = tower.embeddings
    conv = emb.patch_embeddings.projection
    x = g.op('Conv', x, g.weight('patch.weight', conv.weight), g.weight('patch.bias', conv.bias), kernel_shape=[m.PATCH] * 2, strides=[m.PATCH] * 2)
    x = g.op('Transpose', g.op('Reshape', x, g.const([0, h, m.GRID * m.GRID])), perm=[0, 2, 1])
    # A row of zeros in front, then the class token through the position table's first row.
    x = g.op('Pad', x, g.const([0, 1, 0, 0, 0, 0]))
    cls = g.op('Pad', g.weight('cls_token', emb.cls_token), g.const([0, 0, 0, 0, m.GRID * m.GRID, 0]))
    x = g.op('Add', x, g.op('Add', g.weight('position_embeddings', emb.position_embeddings), cls))
    for i, layer in enumerate(tower.encoder.layer):
        n, a = f'vision.{i}', layer.attention
        y = g.layer_norm(x, f'{n}.before', layer.layernorm_before)
        y = g.linear(y, f'{n}.qkv', torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)), torch.cat((a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)))
        y = g.op('Transpose', g.op('Reshape', y, g.const([0, 0, 3 * heads, h // heads])), perm=[0, 2, 1, 3])
        q, k, v = g.op('Split', y, outputs=3, axis=1, num_outputs=3)
        scores = g.op('MatMul', g.op('Mul', q, g.const((h // heads) ** -0.5, np.float32)), g.op('Transpose', k, perm=[0, 1, 3, 2]))
        y = g.op('MatMul', g.op('Softmax', scores, axis=-1), v)
        y = g.op('Reshape', g.op('Transpose', y, perm=[0, 2, 1, 3]), g.const([0, 0, h]))
        y = g.linear(y, f'{n}.out', a.projection_layer.weight, a.projection_layer.bias)
        x = g.op('Add', x, g.op('Mul', y, g.weight(f'{n}.lambda_1', layer.lambda_1)))
        y = g.layer_norm(x, f'{n}.after', layer.layernorm_after)
        y = g.op('Gelu', g.linear(y, f'{n}.fc1', layer.mlp.fc1.weight, layer.mlp.fc1.bias))
        y = g.linear(y, f'{n}.fc2', layer.mlp.fc2.weight, layer.mlp.fc2.bias)
        x = g.op('Add', x, g.op('Mul', y, g.weight(f'{n}.lambda_2', layer.lambda_2)))
    x = g.layer_norm(x, 'vision.norm', tower.layernorm)
    x = g.op('Slice', x, g.const([1]), g.const([m.GRID * m.GRID + 1]), g.const([1]))
    half = m.GRID // 2
    x = g.op('Transpose', g.op('Reshape', x, g.const([-1, half, 2, half, 2, h])), perm=[0, 1, 3, 2, 4, 5])
    x = g.op('Reshape', x, g.const([-1, m.TILE_TOKENS, 4 * h]))
    p = net.model.multi_modal_projector
    x = g.layer_norm(x, 'projector.norm', p.layer_norm)
    x = g.op('Gelu', g.linear(x, 'projector.1', p.linear_1.weight, p.linear_1.bias))
    g.linear(x, 'projector.2', p.linear_2.weight, p.linear_2.bias, out='image_features')
    g.output('image_features', TensorProto.FLOAT, ['tiles', m.TILE_TOKENS, h])
    return g


def embed_graph (net):
    g = Graph('embed_tokens')
    ids = g.input('input_ids', TensorProto.INT64, ['batch_size', 'sequence_length'])
    table = g.weight('embed_tokens.weight', net.model.language_model.embed_tokens.weight)
    g.op('Gather', table, ids, name='inputs_embeds')
    g.output('inputs_embeds', TensorProto.FLOAT, ['batch_size', 'sequence_length', m.HIDDEN])
    return g


def decoder_graph (net):
    g, lm, t = Graph('decoder_model_merged'), net.model.language_model, m.TEXT
    d, heads, kv = t['head_dim'], t['heads'], t['kv_heads']
    x = g.input('inputs_embeds', TensorProto.FLOAT, ['batch_size', 'sequence_length', m.HIDDEN])
    attention = g.input('attention_mask', TensorProto.INT64, ['batch_size', 'total_sequence_length'])
    positions = g.input('position_ids', TensorProto.INT64, ['batch_size', 'sequence_length'])
    past_shape = ['batch_size', kv, 'past_sequence_length', d]
    pasts = [[g.input(f'past_key_values.{i}.{n}', TensorProto.FLOAT, past_shape) for n in ('key', 'value')] for i in range(t['layers'])]

    # Once a run: rotation angles, with the attention scale in the queries' part ...
    inv = (t['theta'] ** (-np.arange(0, d, 2, dtype=np.float32) / d)).astype(np.float32)
    angle = g.op('Mul', g.op('Cast', g.op('Unsqueeze', positions, g.const([1, 3])), to=TensorProto.FLOAT), g.const(np.concatenate((inv, inv)), np.float32))
    scale = np.ones((1, heads + kv, 1, 1), np.float32)
    scale[:, :heads] = d ** -0.5
    cos = g.op('Mul', g.op('Cos', angle), g.const(scale, np.float32))
    # ... and the sign of rotate_half in the sines.
    sign = np.concatenate((-np.ones(d // 2), np.ones(d // 2))).astype(np.float32)
    sin = g.op('Mul', g.op('Sin', angle), g.const(scale * sign, np.float32))
    swap = g.const(np.concatenate((np.arange(d // 2, d), np.arange(d // 2))))
    # ... and the mask: causal, and only over tokens that attention_mask marks. Rows are repeated for each query head of a group.
    total = g.op('Shape', attention, start=1, end=2)
    length = g.op('Shape', positions, start=1, end=2)
    zero, one = g.const(0), g.const(1)
    columns = g.op('Range', zero, g.op('Squeeze', total), one)
    rows = g.op('Range', g.op('Squeeze', g.op('Sub', total, length)), g.op('Squeeze', total), one)
    causal = g.op('LessOrEqual', columns, g.op('Unsqueeze', rows, g.const([1])))
    seen = g.op('Cast', g.op('Unsqueeze', attention, g.const([1, 2])), to=TensorProto.BOOL)
    mask = g.op('Where', g.op('And', seen, causal), g.const(0, np.float32), g.const(NEGATIVE, np.float32))
    mask = g.op('Concat', *[mask] * (heads // kv), axis=2)

    for i, layer in enumerate(lm.layers):
        n, a = f'text.{i}', layer.self_attn
        y = g.rms_norm(x, f'{n}.input_norm', layer.input_layernorm)
        y = g.linear(y, f'{n}.qkv', torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)), torch.cat((a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)))
        y = g.op('Transpose', g.op('Reshape', y, g.const([0, 0, heads + 2 * kv, d])), perm=[0, 2, 1, 3])
        qk, value = g.op('Split', y, g.const([heads + kv, kv]), outputs=[f'text.{i}.qk', f'delta.{i}.value'], axis=1)
        qk = g.op('Add', g.op('Mul', qk, cos), g.op('Mul', g.op('Gather', qk, swap, axis=3), sin))
        q, key = g.op('Split', qk, g.const([heads, kv]), outputs=[f'text.{i}.q', f'delta.{i}.key'], axis=1)
        all_keys = g.op('Concat', pasts[i][0], key, axis=2, name=f'present.{i}.key')
        all_values = g.op('Concat', pasts[i][1], value, axis=2, name=f'present.{i}.value')
        q = g.op('Reshape', q, g.const([0, kv, -1, d]))
        scores = g.op('Add', g.op('MatMul', q, g.op('Transpose', all_keys, perm=[0, 1, 3, 2])), mask)
        y = g.op('MatMul', g.op('Softmax', scores, axis=-1), all_values)
        y = g.op('Transpose', g.op('Reshape', y, g.const([0, kv, heads // kv, -1, d])), perm=[0, 3, 1, 2, 4])
        y = g.op('Reshape', y, g.const([0, 0, heads * d]))
        x = g.op('Add', x, g.linear(y, f'{n}.o', a.o_proj.weight))
        y = g.rms_norm(x, f'{n}.post_norm', layer.post_attention_layernorm)
        gate, up = g.linear(y, f'{n}.gate', layer.mlp.gate_proj.weight), g.linear(y, f'{n}.up', layer.mlp.up_proj.weight)
        y = g.op('Mul', g.op('Mul', gate, g.op('Sigmoid', gate)), up)
        x = g.op('Add', x, g.linear(y, f'{n}.down', layer.mlp.down_proj.weight))
    x = g.rms_norm(x, 'text.norm', lm.norm)
    g.linear(x, 'lm_head', net.lm_head.weight, out='logits')
    g.output('logits', TensorProto.FLOAT, ['batch_size', 'sequence_length', t['vocab']])
    for kind, length in (('present', 'total_sequence_length'), ('delta', 'sequence_length')):
        for i in range(t['layers']):
            for part in ('key', 'value'):
                g.output(f'{kind}.{i}.{part}', TensorProto.FLOAT, ['batch_size', kv, length, d])
    return g


def write_configs (out, tokenizer):
    ids = {n: tokenizer.token_to_id(t) for n, t in (('image', '<IMG_CONTEXT>'), ('eos', '<|im_end|>'), ('pad', '<|endoftext|>'))}
    files = {
        'config.json': m.hf_config(ids),
        'generation_config.json': {
            'do_sample': False, 'eos_token_id': [ids['eos'], ids['pad']], 'pad_token_id': ids['pad'], 'max_new_tokens': 256
        },
        'preprocessor_config.json': {
            'crop_size': None,
            'crop_to_patches': True,
            'data_format': 'channels_first',
            'default_to_square': True,
            'do_convert_rgb': True,
            'do_normalize': True,
            'do_rescale': True,
            'do_resize': True,
            'image_mean': m.MEAN,
            'image_processor_type': 'GotOcr2ImageProcessor',
            'image_seq_length': m.TILE_TOKENS,
            'image_std': m.STD,
            'max_patches': 4,
            'min_patches': 1,
            'processor_class': 'InternVLProcessor',
            'resample': 3,
            'rescale_factor': 1 / 255,
            'size': {'height': m.TILE, 'width': m.TILE},
            'use_thumbnail': True
        }
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + '\n')


def round_half (net):
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.to(torch.float16).float())


def check (out, net):
    """Logits of the graphs against transformers' own InternVL, with past and without, padded and not."""
    import onnxruntime as ort
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig.from_pretrained(out)
    reference = InternVLForConditionalGeneration(config).eval()
    reference.load_state_dict(net.state_dict(), strict=True)
    sessions = {n: ort.InferenceSession(str(out / 'onnx' / f'{n}.onnx'), providers=['CPUExecutionProvider']) for n in ('vision_encoder', 'embed_tokens', 'decoder_model_merged')}
    torch.manual_seed(7)
    pixels = torch.randn(5, 3, m.TILE, m.TILE)
    image = config.image_token_id
    ids = torch.randint(0, 1000, (2, 60))
    ids[:, 10:50] = image
    with torch.no_grad():
        want_features = reference.model.get_image_features(pixels, vision_feature_layer=-1, vision_feature_select_strategy='default').pooler_output
        want = reference(input_ids=ids, pixel_values=pixels).logits
    features, = sessions['vision_encoder'].run(None, {'pixel_values': pixels.numpy()})
    embeds, = sessions['embed_tokens'].run(None, {'input_ids': ids.numpy()})
    embeds[ids.numpy() == image] = features.reshape(-1, m.HIDDEN)
    t = m.TEXT
    names = [o.name for o in sessions['decoder_model_merged'].get_outputs()]

    def decode (x, mask, positions, past):
        feeds = {'inputs_embeds': x, 'attention_mask': mask, 'position_ids': positions}
        for i in range(t['layers']):
            feeds[f'past_key_values.{i}.key'], feeds[f'past_key_values.{i}.value'] = past[2 * i], past[2 * i + 1]
        return dict(zip(names, sessions['decoder_model_merged'].run(None, feeds)))

    empty = [np.zeros((2, t['kv_heads'], 0, t['head_dim']), np.float32)] * (2 * t['layers'])
    positions = np.tile(np.arange(60), (2, 1))
    whole = decode(embeds, np.ones((2, 60), np.int64), positions, empty)
    # The same in three pieces, the second sequence's past padded on the left with rubbish.
    pad = 5
    first = decode(embeds[:, :50], np.ones((2, 50), np.int64), positions[:, :50], empty)
    past = [np.concatenate((np.full((2, t['kv_heads'], pad, t['head_dim']), 3, np.float32), first[f'present.{i}.{n}']), 2) for i in range(t['layers']) for n in ('key', 'value')]
    steps = []
    for s in range(50, 60):
        mask = np.ones((2, pad + s + 1), np.int64)
        mask[:, :pad] = 0
        step = decode(embeds[:, s:s + 1], mask, positions[:, s:s + 1], past)
        for i in range(t['layers']):
            for j, n in enumerate(('key', 'value')):
                grown = np.concatenate((past[2 * i + j], step[f'delta.{i}.{n}']), 2)
                assert np.array_equal(grown, step[f'present.{i}.{n}'])
                past[2 * i + j] = grown
        steps.append(step['logits'])
    result = {
        'features': float(np.abs(features - want_features.numpy()).max()),
        'logits': float(np.abs(whole['logits'] - want.numpy()).max()),
        'stepwise': float(np.abs(np.concatenate(steps, 1) - whole['logits'][:, 50:]).max()),
        'range of logits': float(np.abs(want.numpy()).max())
    }
    print('largest difference from transformers:', json.dumps(result))
    assert result['features'] < 1e-3 and result['logits'] < 1e-3 and result['stepwise'] < 1e-3


def read_weights (out):
    """The state dict that the graphs of a folder were made of."""
    arrays = {}
    for graph in ('vision_encoder', 'embed_tokens', 'decoder_model_merged'):
        for tensor in onnx.load(str(Path(out) / 'onnx' / f'{graph}.onnx')).graph.initializer:
            if tensor.name.endswith('.fp16'):
                arrays[tensor.name[:-5]] = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32))
    state, t = {}, m.TEXT
    vision, text, projector = 'model.vision_tower', 'model.language_model', 'model.multi_modal_projector'

    def put (name, source, linear=False):
        state[name] = arrays[source].t().contiguous() if linear else arrays[source]

    def put_linear (name, source, bias=True):
        put(f'{name}.weight', f'{source}.weight', linear=True)
        if bias:
            put(f'{name}.bias', f'{source}.bias')

    def put_norm (name, source, bias=True):
        put(f'{name}.weight', f'{source}.weight')
        if bias:
            put(f'{name}.bias', f'{source}.bias')

    def put_qkv (name, source, sizes):
        for part, weight, bias in zip('qkv', arrays[f'{source}.weight'].t().split(sizes), arrays[f'{source}.bias'].split(sizes)):
            state[f'{name}.{part}_proj.weight'], state[f'{name}.{part}_proj.bias'] = weight.contiguous(), bias

    embeddings = f'{vision}.embeddings'
    put(f'{embeddings}.patch_embeddings.projection.weight', 'patch.weight')
    put(f'{embeddings}.patch_embeddings.projection.bias', 'patch.bias')
    put(f'{embeddings}.cls_token', 'cls_token')
    put(f'{embeddings}.position_embeddings', 'position_embeddings')
    for i in range(m.VISION['layers']):
        name, source = f'{vision}.encoder.layer.{i}', f'vision.{i}'
        put_norm(f'{name}.layernorm_before', f'{source}.before')
        put_norm(f'{name}.layernorm_after', f'{source}.after')
        put_qkv(f'{name}.attention', f'{source}.qkv', [m.HIDDEN] * 3)
        put_linear(f'{name}.attention.projection_layer', f'{source}.out')
        put_linear(f'{name}.mlp.fc1', f'{source}.fc1')
        put_linear(f'{name}.mlp.fc2', f'{source}.fc2')
        put(f'{name}.lambda_1', f'{source}.lambda_1')
        put(f'{name}.lambda_2', f'{source}.lambda_2')
    put_norm(f'{vision}.layernorm', 'vision.norm')
    put_norm(f'{projector}.layer_norm', 'projector.norm')
    put_linear(f'{projector}.linear_1', 'projector.1')
    put_linear(f'{projector}.linear_2', 'projector.2')
    put(f'{text}.embed_tokens.weight', 'embed_tokens.weight')
    for i in range(t['layers']):
        name, source = f'{text}.layers.{i}', f'text.{i}'
        put_norm(f'{name}.input_layernorm', f'{source}.input_norm', bias=False)
        put_norm(f'{name}.post_attention_layernorm', f'{source}.post_norm', bias=False)
        put_qkv(f'{name}.self_attn', f'{source}.qkv', [t['heads'] * t['head_dim'], *[t['kv_heads'] * t['head_dim']] * 2])
        put_linear(f'{name}.self_attn.o_proj', f'{source}.o', bias=False)
        for part in ('gate', 'up', 'down'):
            put_linear(f'{name}.mlp.{part}_proj', f'{source}.{part}', bias=False)
    put_norm(f'{text}.norm', 'text.norm', bias=False)
    put_linear('lm_head', 'lm_head', bias=False)
    return state


def export (out, net, checks=True):
    from tokenizers import Tokenizer

    out = Path(out)
    (out / 'onnx').mkdir(parents=True, exist_ok=True)
    net = net.float().cpu().eval()
    round_half(net)
    write_configs(out, Tokenizer.from_file(str(out / 'tokenizer.json')))
    vision_graph(net).save(out / 'onnx' / 'vision_encoder.onnx')
    embed_graph(net).save(out / 'onnx' / 'embed_tokens.onnx')
    decoder_graph(net).save(out / 'onnx' / 'decoder_model_merged.onnx')
    size = sum(f.stat().st_size for f in out.rglob('*') if f.is_file() and 'train' not in f.relative_to(out).parts)
    print(f'{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {size / 1e6:.2f} MB')
    assert size <= 20e6
    if checks:
        check(out, net)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out')
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--random', action='store_true')
    args = parser.parse_args()
    torch.manual_seed(0)
    net = m.TinyInternVL()
    if args.checkpoint:
        net.load_state_dict({k: v.float() for k, v in torch.load(args.checkpoint, map_location='cpu').items()})
    if args.checkpoint or args.random:
        export(args.out, net)
    else:
        net.load_state_dict(read_weights(args.out))
        check(Path(args.out), net)
