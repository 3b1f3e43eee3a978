"""x_transformers Attention: heads mixed by a 1x1 convolution before and after the softmax, causal (hard: heads mix inside the chain)."""

import torch
from torch import nn
from x_transformers.x_transformers import Attention

FEATURE = "talking-heads-pre-post+causal"
EXPECT = "fuse"
HEAD_DIM, SEQ = 24, 50


class Model(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(
            dim=dim, dim_head=HEAD_DIM, heads=heads, causal=True, pre_talking_heads=True, post_talking_heads=True
        )
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
