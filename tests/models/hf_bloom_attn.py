"""transformers BloomAttention: ALiBi through baddbmm, then the mask, float32 softmax, bmm, residual added at the end."""

import torch
from torch import nn
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

FEATURE = "alibi-baddbmm"
EXPECT = "fuse"
HEAD_DIM, SEQ = 16, 50
CONFIG = BloomConfig(hidden_size=64, n_head=4, n_layer=1)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.attn = BloomAttention(config, layer_idx=0)
        self.eval()

    def forward(self, x, residual, alibi, mask):
        return self.attn(x, residual, alibi=alibi, attention_mask=mask)[0]


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    alibi = build_alibi_tensor(torch.ones(2, SEQ), 4, torch.float32)
    mask = torch.full((SEQ, SEQ), torch.finfo(torch.float32).min).triu(1)[None, None]
    return [torch.randn(2, SEQ, 64), torch.randn(2, SEQ, 64), alibi, mask]
