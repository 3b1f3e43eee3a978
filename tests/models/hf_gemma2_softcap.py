"""transformers Gemma2Attention (eager): tanh logit softcap and a sliding-window mask, grouped heads, head_dim 40."""

import torch
from torch import nn
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding

FEATURE = "tanh-softcap+sliding-mask+gqa"
EXPECT = "fuse"
HEAD_DIM, SEQ = 40, 50
CONFIG = Gemma2Config(
    hidden_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    query_pre_attn_scalar=24,
    attn_logit_softcapping=5.0,
    sliding_window=12,
    num_hidden_layers=2,
    attn_implementation="eager",
)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Gemma2Attention(config, layer_idx=0)
        self.eval()

    def forward(self, x, cos, sin, mask):
        return self.attn(x, position_embeddings=(cos, sin), attention_mask=mask)[0]


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    x = torch.randn(1, SEQ, 96) * 3
    cos, sin = Gemma2RotaryEmbedding(CONFIG)(x, torch.arange(SEQ)[None])
    d = torch.arange(SEQ)[:, None] - torch.arange(SEQ)[None]
    mask = torch.where((d >= 0) & (d < 12), 0.0, torch.finfo(torch.float32).min)[None, None]
    return [x, cos, sin, mask]
