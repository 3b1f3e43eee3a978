"""timm xcit.XCA: attention between channels (24x24) of L2-normalised q and k with a temperature per head."""

import torch
from timm.models.xcit import XCA
from torch import nn

FEATURE = "cross-covariance-channel-attention"
EXPECT = "fuse"
HEAD_DIM, SEQ = 24, 50


class Model(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        torch.manual_seed(0)
        self.attn = XCA(dim, num_heads=heads, qkv_bias=True)
        self.attn.fused_attn = False
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.eval()

    def forward(self, x):
        return self.attn(x)


def get_init_inputs():
    return [96, 4]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randn(2, SEQ, 96)]
