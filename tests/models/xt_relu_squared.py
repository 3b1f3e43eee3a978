"""x_transformers Attention: squared ReLU of the logits as weights (custom_attn_fn), causal."""

import torch
from torch import nn
from x_transformers.x_transformers import Attention, ReluSquared

FEATURE = "relu-squared-attention-no-normalizer"
EXPECT = "fuse"
HEAD_DIM, SEQ = 16, 40


class Model(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(dim=dim, dim_head=HEAD_DIM, heads=heads, causal=True, custom_attn_fn=ReluSquared())
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.eval()

    def forward(self, x):
        return self.attn(x)


def get_init_inputs():
    return [64, 4]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randn(2, SEQ, 64)]
