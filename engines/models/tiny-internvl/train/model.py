"""InternVL as `transformers` implements it, written out so that it trains fast.

Parameter names and arithmetic are those of `InternVLForConditionalGeneration`: a state dict of this
module loads there unchanged (export.py does so, and compares).
"""
import torch
from torch import nn
from torch.nn import functional as F

TILE = 112
PATCH = 14
GRID = TILE // PATCH
TILE_TOKENS = (GRID // 2) ** 2
HIDDEN = 256
VISION = dict(layers=6, heads=8, mlp=1024, eps=1e-6)
TEXT = dict(vocab=1024, layers=6, heads=8, kv_heads=2, head_dim=32, mlp=640, eps=1e-6, theta=10000.0)
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]


class Holder(nn.Module):
    """Gives parameters the names they have in transformers."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class VisionLayer(nn.Module):
    def __init__(self):
        super().__init__()
        h, mlp, eps = HIDDEN, VISION['mlp'], VISION['eps']
        self.attention = Holder(q_proj=nn.Linear(h, h), k_proj=nn.Linear(h, h), v_proj=nn.Linear(h, h), projection_layer=nn.Linear(h, h))
        self.mlp = Holder(fc1=nn.Linear(h, mlp), fc2=nn.Linear(mlp, h))
        self.layernorm_before = nn.LayerNorm(h, eps=eps)
        self.layernorm_after = nn.LayerNorm(h, eps=eps)
        self.lambda_1 = nn.Parameter(torch.ones(h))
        self.lambda_2 = nn.Parameter(torch.ones(h))

    def forward(self, x):
        n, t, h = x.shape
        a, y = self.attention, self.layernorm_before(x)
        q, k, v = (p(y).view(n, t, VISION['heads'], -1).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, h)
        x = x + self.lambda_1 * a.projection_layer(y)
        return x + self.lambda_2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.layernorm_after(x))))


class VisionEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, HIDDEN))
        self.position_embeddings = nn.Parameter(torch.randn(1, GRID * GRID + 1, HIDDEN) * 0.02)
        self.patch_embeddings = Holder(projection=nn.Conv2d(3, HIDDEN, PATCH, PATCH))

    def forward(self, pixels):
        # The convolution as one matrix product over patches.
        n = pixels.shape[0]
        conv = self.patch_embeddings.projection
        x = pixels.view(n, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, GRID * GRID, 3 * PATCH * PATCH)
        x = F.linear(x, conv.weight.view(HIDDEN, -1), conv.bias)
        return torch.cat((self.cls_token.expand(n, -1, -1).to(x.dtype), x), 1) + self.position_embeddings


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate (x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class TextLayer(nn.Module):
    def __init__(self):
        super().__init__()
        h, d, mlp = HIDDEN, TEXT['head_dim'], TEXT['mlp']
        q, kv = TEXT['heads'] * d, TEXT['kv_heads'] * d
        self.self_attn = Holder(q_proj=nn.Linear(h, q), k_proj=nn.Linear(h, kv), v_proj=nn.Linear(h, kv), o_proj=nn.Linear(q, h, bias=False))
        self.mlp = Holder(gate_proj=nn.Linear(h, mlp, bias=False), up_proj=nn.Linear(h, mlp, bias=False), down_proj=nn.Linear(mlp, h, bias=False))
        self.input_layernorm = RMSNorm(h, TEXT['eps'])
        self.post_attention_layernorm = RMSNorm(h, TEXT['eps'])

    def forward(self, x, cos, sin, mask):
        n, t, h = x.shape
        a, y, d = self.self_attn, self.input_layernorm(x), TEXT['head_dim']
        q, k, v = (p(y).view(n, t, -1, d).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = TEXT['heads'] // TEXT['kv_heads']
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)
        x = x + a.o_proj(y.transpose(1, 2).reshape(n, t, h))
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


class TinyInternVL(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Holder(
            vision_tower=Holder(
                embeddings=VisionEmbeddings(),
                encoder=Holder(layer=nn.ModuleList([VisionLayer() for _ in range(VISION['layers'])])),
                layernorm=nn.LayerNorm(HIDDEN, eps=VISION['eps'])),
            multi_modal_projector=Holder(
                layer_norm=nn.LayerNorm(4 * HIDDEN), linear_1=nn.Linear(4 * HIDDEN, HIDDEN), linear_2=nn.Linear(HIDDEN, HIDDEN)),
            language_model=Holder(
                embed_tokens=nn.Embedding(TEXT['vocab'], HIDDEN),
                layers=nn.ModuleList([TextLayer() for _ in range(TEXT['layers'])]),
                norm=RMSNorm(HIDDEN, TEXT['eps'])))
        self.lm_head = nn.Linear(HIDDEN, TEXT['vocab'], bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                fan = p.shape[1]
                std = 0.02 if 'embed_tokens' in name or 'lm_head' in name else fan ** -0.5
                if name.endswith(('o_proj.weight', 'down_proj.weight', 'projection_layer.weight', 'fc2.weight')):
                    std /= (2 * 6) ** 0.5
                nn.init.normal_(p, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def see (self, pixels):
        """[tiles, 3, 112, 112] -> [tiles, 16, 256]"""
        tower = self.model.vision_tower
        x = tower.embeddings(pixels)
        for layer in tower.encoder.layer:
            x = layer(x)
        x = tower.layernorm(x)[:, 1:]
        n, h = x.shape[0], HIDDEN
        x = x.reshape(n, GRID // 2, 2, GRID // 2, 2, h).permute(0, 1, 3, 2, 4, 5).reshape(n, TILE_TOKENS, 4 * h)
        p = self.model.multi_modal_projector
        return p.linear_2(F.gelu(p.linear_1(p.layer_norm(x))))

    def read (self, x, positions, mask):
        """Embeddings -> last hidden states; `mask` is boolean, [rows, 1, tokens, tokens]."""
        d = TEXT['head_dim']
        inv = TEXT['theta'] ** (-torch.arange(0, d, 2, device=x.device).float() / d)
        angle = positions[:, None, :, None].float() * inv
        cos, sin = (f(torch.cat((angle, angle), -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        lm = self.model.language_model
        for layer in lm.layers:
            x = layer(x, cos, sin, mask)
        return lm.norm(x)


def hf_config (eos):
    """The same architecture in transformers' words."""
    return {
        'architectures': ['InternVLForConditionalGeneration'],
        'model_type': 'internvl',
        'downsample_ratio': 0.5,
        'image_seq_length': TILE_TOKENS,
        'image_token_id': eos['image'],
        'eos_token_id': eos['eos'],
        'pad_token_id': eos['pad'],
        'projector_hidden_act': 'gelu',
        'tie_word_embeddings': False,
        'vision_feature_layer': -1,
        'vision_feature_select_strategy': 'default',
        'text_config': {
            'architectures': ['Qwen2ForCausalLM'],
            'model_type': 'qwen2',
            'attention_dropout': 0.0,
            'eos_token_id': eos['eos'],
            'pad_token_id': eos['pad'],
            'hidden_act': 'silu',
            'hidden_size': HIDDEN,
            'head_dim': TEXT['head_dim'],
            'initializer_range': 0.02,
            'intermediate_size': TEXT['mlp'],
            'max_position_embeddings': 4096,
            'num_attention_heads': TEXT['heads'],
            'num_hidden_layers': TEXT['layers'],
            'num_key_value_heads': TEXT['kv_heads'],
            'rms_norm_eps': TEXT['eps'],
            'rope_theta': TEXT['theta'],
            'tie_word_embeddings': False,
            'use_cache': True,
            'use_sliding_window': False,
            'vocab_size': TEXT['vocab']
        },
        'vision_config': {
            'architectures': ['InternVLVisionModel'],
            'model_type': 'internvl_vision',
            'attention_bias': True,
            'attention_dropout': 0.0,
            'hidden_act': 'gelu',
            'hidden_dropout_prob': 0.0,
            'hidden_size': HIDDEN,
            'image_size': [TILE, TILE],
            'initializer_range': 0.02,
            'intermediate_size': VISION['mlp'],
            'layer_norm_eps': VISION['eps'],
            'layer_scale_init_value': 1.0,
            'norm_type': 'layer_norm',
            'num_attention_heads': VISION['heads'],
            'num_channels': 3,
            'num_hidden_layers': VISION['layers'],
            'patch_size': [PATCH, PATCH],
            'projection_dropout': 0.0,
            'use_absolute_position_embeddings': True,
            'use_mask_token': False,
            'use_mean_pooling': False,
            'use_qk_norm': False
        },
        'torch_dtype': 'float32'
    }
